"""``python -m benchmarks.run --suite gpu``: time, memory and errors of every provider, by part.

benchmarks/notes.md says what is measured and how.  Each cell is written as soon as it is measured.
When the time is up, the missing cells are printed, and ``--resume`` continues with them.  When the
device is lost, the cell is thrown away; ``--resume`` measures it again, in a process that has the
device again, and leaves out the provider that lost it.

Exit status: 0; 1 if the device was lost; 2 for wrong use; 3 if the time was up.
"""

import argparse
import os
import sys
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import torch

from benchmarks.storage import RESULTS, SuiteResults, file_slug, stamp
from benchmarks.suites import SUITES, CellRequest, Suite, expected_seconds
from fused_sd import checks
from fused_sd.bench.cell import Cell
from fused_sd.bench.limits import DeviceLost
from fused_sd.bench.problem import SHAPES, Problem, make_problem, variant
from fused_sd.bench.providers import PROVIDERS, Provider
from fused_sd.bench.rounds import measure_cell
from fused_sd.bench.table import report_lines
from fused_sd.measuring.environment import device_name

DONE, LOST, MISUSED, TIME_UP = 0, 1, 2, 3


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run")
    add = parser.add_argument
    add("--suite", choices=tuple(SUITES), required=True)
    add("--parts", help="comma-separated parts of the suite (default: all)")
    add("--out", type=Path, default=RESULTS, help="folder that holds one folder for each device")
    add("--name", help="name of the results' file, for parts that another commit measured")
    add("--resume", action="store_true", help="keep the cells that --out holds already")
    add("--minutes", type=float, help="start no cell that ends later (default: the suite's time)")
    add("--commit", help="commit to store in the results, for a copy without .git")
    add("--plan", action="store_true", help="print the cells and their expected time, then stop")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure a suite and return the exit status."""
    options = parse(arguments)
    suite = SUITES[options.suite]
    try:
        parts = chosen_parts(options.parts, suite)
        if options.plan:
            print(*plan_lines(options.suite, parts), sep="\n")
            return DONE
        device = torch.device("cuda" if options.suite == "gpu" else "cpu")
        if device.type == "cuda" and not torch.cuda.is_available():
            checks.fail("--suite", "be cpu where PyTorch sees no GPU", "'gpu'", "pass --suite cpu")
        folder = options.out / file_slug(device_name(device))
        environment = stamp(device, options.commit)
        results = SuiteResults(folder, options.name or options.suite, environment, options.resume)
    except ValueError as error:
        print(f"benchmarks.run: {error}", file=sys.stderr)
        return MISUSED
    minutes = suite.minutes if options.minutes is None else options.minutes
    return measure(options.suite, parts, results, device, time.monotonic() + 60 * minutes)


def chosen_parts(text: str | None, suite: Suite) -> list[str]:
    """Return the names of the parts to measure."""
    if text is None:
        return list(suite.parts)
    parts = [name.strip() for name in text.split(",")]
    for name in parts:
        checks.check_one_of("--parts", name, tuple(suite.parts))
    return parts


def plan_lines(suite_name: str, parts: Sequence[str]) -> Iterator[str]:
    """Yield the cells of each part with the seconds that they are expected to take."""
    total = 0.0
    for part in parts:
        requests = SUITES[suite_name].parts[part]
        seconds = [expected_seconds(request, suite_name) for request in requests]
        total += sum(seconds)
        yield f"{part}: {sum(seconds):.0f} s"
        yield from (f"  {request.key}: {one:.0f} s" for request, one in zip(requests, seconds))
    yield f"in all {total:.0f} s, of {60 * SUITES[suite_name].minutes:.0f}"


def measure(
    suite_name: str,
    parts: Sequence[str],
    results: SuiteResults,
    device: torch.device,
    deadline: float,
) -> int:
    """Measure the cells that the results do not hold yet, and return the exit status."""
    requests = [(part, request) for part in parts for request in SUITES[suite_name].parts[part]]
    missing = [(part, request) for part, request in requests if not results.has(part, request.key)]
    # cells that differ in their tokens alone take the first tokens of the same operands
    largest: dict[OperandSettings, int] = {}
    for _, request in requests:
        settings = _operand_settings(request)
        largest[settings] = max(request.tokens, largest.get(settings, 0))
    for place, (part, request) in enumerate(missing):
        expected = expected_seconds(request, suite_name)
        if time.monotonic() + expected > deadline:
            rest = "; ".join(f"{part}: {request.key}" for part, request in missing[place:])
            print(f"The time is up before {rest}.  Run again with --resume.", flush=True)
            return TIME_UP
        print(f"\n[{part}] about {expected:.0f} s", flush=True)
        started = time.monotonic()
        settings = _operand_settings(request)
        operands = make_operands(settings, largest[settings], device)
        try:
            cell = measure_request(request, operands, SUITES[suite_name], results.lost)
        except DeviceLost as error:
            results.lost[error.provider] = f"{error} ({part}: {request.key})"
            results.write()
            print(f"{error}.  Run again with --resume.", file=sys.stderr)
            return LOST
        seconds = time.monotonic() - started
        results.add(
            part, request.key, cell.as_json() | {"shape": request.shape, "seconds": seconds}
        )
        print(*report_lines(cell), f"{seconds:.0f} s", sep="\n", flush=True)
    return DONE


class OperandSettings(NamedTuple):
    """Everything that decides a cell's operands, except the number of tokens."""

    shape: str
    kl: float
    dtype: str
    entropy: float | None


def _operand_settings(request: CellRequest) -> OperandSettings:
    return OperandSettings(request.shape, request.kl, request.dtype, request.entropy)


@lru_cache(maxsize=1)
def make_operands(settings: OperandSettings, num_tokens: int, device: torch.device) -> Problem:
    """Draw the operands; the last ones are kept for the cells that follow."""
    return make_problem(
        SHAPES[settings.shape],
        num_tokens,
        kl=settings.kl,
        entropy=settings.entropy,
        dtype=getattr(torch, settings.dtype),
        device=device,
    )


def measure_request(
    request: CellRequest, operands: Problem, suite: Suite, lost: Mapping[str, str]
) -> Cell:
    """Measure one cell on the first tokens of the operands, without those who lost the device."""
    problem = variant(
        operands,
        objective=request.objective,
        num_tokens=request.tokens,
        trainable=request.trainable,
        mask_share=request.mask_share,
    )
    return measure_cell(
        problem,
        operands,
        [_unless_lost(p, lost) for p in PROVIDERS if p.name in request.providers],
        suite.effort if request.timed else None,
        floor_warm_seconds=suite.floor_warm_seconds,
        provider_seconds=suite.provider_seconds,
        seed=len(request.key) + request.tokens,
    )


def _unless_lost(provider: Provider, lost: Mapping[str, str]) -> Provider:
    """Return the provider, or one that refuses every problem if it has lost the device before."""
    reason = lost.get(provider.name)
    return provider if reason is None else provider._replace(why_not=lambda problem: reason)


if __name__ == "__main__":
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
    warnings.filterwarnings("ignore")  # peers warn about what they import
    raise SystemExit(main())
