"""``python -m benchmarks.run --suite gpu``: time, memory and errors of everybody, part by part.

What is measured and how is told in benchmarks/notes.md.  A cell is on disk as soon as it is done;
where the time is up, what is left is named, and ``--resume`` goes on there.

Exit status: 0; 1 when the device was lost; 2 for wrong use; 3 when the time was up.
"""

import argparse
import os
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import torch

from benchmarks.results_store import RESULTS, Store, file_slug, stamp
from benchmarks.suites import SUITES, Asked, Suite, expected_seconds
from fused_sd import checks
from fused_sd.bench.cell import Cell, measure_cell
from fused_sd.bench.measure import synchronize
from fused_sd.bench.problem import SHAPES, Problem, make_problem, variant
from fused_sd.bench.providers import PROVIDERS
from fused_sd.bench.table import report_lines
from fused_sd.measuring.environment import device_name

STEP = "step"  # measured by benchmarks/step, in processes of its own
DONE, LOST, MISUSED, TIME_UP = 0, 1, 2, 3


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run")
    add = parser.add_argument
    add("--suite", choices=tuple(SUITES), required=True)
    add("--parts", help=f"of the suite's, comma-separated (default: all but {STEP})")
    add("--out", type=Path, default=RESULTS, help="folder with one for each device")
    add("--name", help="of the results' file: parts of another commit have one of their own")
    add("--resume", action="store_true", help="keep the cells that are in --out")
    add("--minutes", type=float, help="after which nothing more is begun (default: the suite's)")
    add("--commit", help="to be written into the results, for a copy without .git")
    add("--plan", action="store_true", help="print what would be measured and how long it takes")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure; returns the exit status."""
    chosen = parse(arguments)
    suite = SUITES[chosen.suite]
    try:
        parts = chosen_parts(chosen.parts, suite)
        if chosen.plan:
            print(*plan_lines(chosen.suite, parts), sep="\n")
            return DONE
        device = torch.device("cuda" if chosen.suite == "gpu" else "cpu")
        if device.type == "cuda" and not torch.cuda.is_available():
            checks.fail("--suite", "be cpu where PyTorch sees no GPU", "'gpu'", "pass --suite cpu")
        folder = chosen.out / file_slug(device_name(device))
        named = chosen.name or chosen.suite
        store = Store(folder, named, stamp(device, chosen.commit), chosen.resume)
    except ValueError as error:
        print(f"benchmarks.run: {error}", file=sys.stderr)
        return MISUSED
    minutes = suite.minutes if chosen.minutes is None else chosen.minutes
    deadline = time.monotonic() + 60 * minutes
    status = measure(chosen.suite, parts, store, device, deadline)
    if status == DONE and STEP in parts:
        status = measure_step(folder, device, deadline - time.monotonic(), chosen)
    return status


def chosen_parts(text: str | None, suite: Suite) -> list[str]:
    """The parts by name."""
    if text is None:
        return list(suite.parts)
    parts = [name.strip() for name in text.split(",")]
    for name in parts:
        checks.check_one_of("--parts", name, (*suite.parts, STEP))
    return parts


def plan_lines(name: str, parts: Sequence[str]) -> Iterator[str]:
    """Each part's cells and expected seconds."""
    total = 0.0
    for part in parts:
        if part == STEP:
            yield f"{STEP}: all the minutes that are left"
            continue
        cells = SUITES[name].parts[part]
        seconds = [expected_seconds(asked, name) for asked in cells]
        total += sum(seconds)
        yield f"{part}: {sum(seconds):.0f} s"
        yield from (f"  {asked.key}: {took:.0f} s" for asked, took in zip(cells, seconds))
    yield f"in all {total:.0f} s, of {60 * SUITES[name].minutes:.0f}"


def measure(
    name: str, parts: Sequence[str], store: Store, device: torch.device, deadline: float
) -> int:
    """The cells that are not in the store yet."""
    named = [(part, a) for part in parts if part != STEP for a in SUITES[name].parts[part]]
    left = [(part, asked) for part, asked in named if not store.has(part, asked.key)]
    # problems of one shape, KL and entropy are drawn once, at the largest size that is asked for
    largest: dict[Drawn, int] = {}
    for _, asked in named:
        largest[_drawn(asked)] = max(asked.tokens, largest.get(_drawn(asked), 0))
    for place, (part, asked) in enumerate(left):
        seconds = expected_seconds(asked, name)
        if time.monotonic() + seconds > deadline:
            rest = "; ".join(f"{p}: {a.key}" for p, a in left[place:])
            print(f"The time is up before {rest}.  Run again with --resume.", flush=True)
            return TIME_UP
        print(f"\n[{part}] about {seconds:.0f} s", flush=True)
        started = time.monotonic()
        operands = source(_drawn(asked), largest[_drawn(asked)], device)
        cell = measure_asked(asked, operands, SUITES[name])
        took = time.monotonic() - started
        store.add(part, asked.key, cell.as_json() | {"shape": asked.shape, "seconds": took})
        print(*report_lines(cell), f"{took:.0f} s", sep="\n", flush=True)
        try:
            synchronize(device)
        except RuntimeError as error:
            print(f"The device was lost ({error}).  Run again with --resume.", file=sys.stderr)
            return LOST
    return DONE


class Drawn(NamedTuple):
    """What decides the operands, beside their number."""

    shape: str
    kl: float
    dtype: str
    entropy: float | None


def _drawn(asked: Asked) -> Drawn:
    return Drawn(asked.shape, asked.kl, asked.dtype, asked.entropy)


@lru_cache(maxsize=1)
def source(drawn: Drawn, num_tokens: int, device: torch.device) -> Problem:
    """Operands that several cells take the first tokens of."""
    return make_problem(
        SHAPES[drawn.shape],
        num_tokens,
        kl=drawn.kl,
        entropy=drawn.entropy,
        dtype=getattr(torch, drawn.dtype),
        device=device,
    )


def measure_asked(asked: Asked, operands: Problem, suite: Suite) -> Cell:
    """One cell."""
    problem = variant(
        operands,
        objective=asked.objective,
        num_tokens=asked.tokens,
        trainable=asked.trainable,
        mask_share=asked.mask_share,
    )
    return measure_cell(
        problem,
        operands,
        [provider for provider in PROVIDERS if provider.name in asked.providers],
        suite.effort if asked.timed else None,
        floor_warm_seconds=suite.floor_warm_seconds,
        seed=len(asked.key) + asked.tokens,
    )


def measure_step(
    folder: Path, device: torch.device, seconds: float, chosen: argparse.Namespace
) -> int:
    """The whole training step, in the time that is left."""
    command = [sys.executable, "-m", "benchmarks.step", "--out", str(folder)]
    command += ["--device", device.type, "--budget-seconds", f"{max(0.0, seconds):.0f}"]
    command += [] if chosen.commit is None else ["--commit", chosen.commit]
    return subprocess.run([*command, "--resume"] if chosen.resume else command).returncode


if __name__ == "__main__":
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
    warnings.filterwarnings("ignore")  # of peers, on what they import
    raise SystemExit(main())
