"""``python -m benchmarks.step``: measure each trainer's step in a process of its own.

The results file is written after every finding.

Exit status: 0; 2 for wrong use; 3 if something is still to be measured.
"""

import argparse
import sys
import time
from collections.abc import Callable, Collection, Sequence
from functools import partial
from pathlib import Path

import torch

from benchmarks.step import process
from benchmarks.step.plan import Settings, job_seconds, jobs, least_seconds
from benchmarks.step.providers import PROVIDERS
from benchmarks.step.report import markdown
from benchmarks.step.results import Results
from benchmarks.step.sizes import SIZES
from benchmarks.storage import RESULTS, file_slug
from fused_sd.measuring.environment import default_device, device_name

DONE, MISUSED, UNFINISHED = 0, 2, 3


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.step",
        description="A whole SDPO step: TRL's trainers and fused_sd's on the same batch.",
    )
    add = parser.add_argument
    add("--models", type=_names(SIZES), default=list(SIZES)[:3])
    add("--lengths", type=_lengths, default=(4096, 16384, 32768, 65536))
    add("--providers", type=_names(PROVIDERS), default=list(PROVIDERS))
    add("--out", type=Path, help="folder of step.json (default: the device's results)")
    add("--resume", action="store_true", help="keep the results that --out holds already")
    add("--budget-seconds", type=float, help="leave out what does not fit into this time")
    add("--steps", type=int, default=3, help="timed steps for each length (default 3)")
    add("--row-tokens", type=int, default=8192, help="longest response of a row (default 8192)")
    add(
        "--longest-cap",
        type=int,
        help="largest length that the search for the longest response tries; 0: no search "
        "(default: twice the longest of --lengths; on the CPU 0 without --memory-limit)",
    )
    add("--precision", type=float, default=0.06, help="relative precision of the search (0.06)")
    add("--memory-limit", type=float, help="GiB that a step may hold at most")
    add("--commit", help="commit to store in the results, for a copy without .git")
    add("--device", choices=("cpu", "cuda"), default=default_device().type)
    add("--dtype", choices=("bfloat16", "float32"), help="default: bfloat16 on a GPU")
    options = parser.parse_args(arguments)
    is_bounded = options.device == "cuda" or options.memory_limit is not None
    if options.longest_cap is None:
        options.longest_cap = 2 * options.lengths[-1] if is_bounded else 0
    if options.longest_cap and not is_bounded:
        parser.error("--longest-cap on the CPU must come with --memory-limit, got none; pass both")
    if options.steps < 1:
        parser.error(f"--steps must be at least 1, got {options.steps}; leave it out for 3")
    return options


def settings_of(options: argparse.Namespace) -> Settings:
    limit = options.memory_limit
    return Settings(
        device=options.device,
        dtype=options.dtype or ("bfloat16" if options.device == "cuda" else "float32"),
        lengths=options.lengths,
        steps=options.steps,
        row_tokens=options.row_tokens,
        longest_cap=options.longest_cap,
        precision=options.precision,
        memory_limit=None if limit is None else int(limit * 2**30),
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure the trainers and return the exit status."""
    options = parse(arguments)
    settings = settings_of(options)
    folder = options.out or RESULTS / file_slug(device_name(torch.device(options.device)))
    try:
        results = Results(folder, settings, resume=options.resume, at_commit=options.commit)
    except ValueError as error:
        print(f"benchmarks.step: {error}", file=sys.stderr)
        return MISUSED
    planned = jobs(options.models, options.providers, settings, results.lanes)
    print(f"{len(planned)} processes, about {sum(map(job_seconds, planned)):.0f} s in all")
    started = time.perf_counter()
    for job in planned:
        seconds = None
        if options.budget_seconds is not None:
            seconds = options.budget_seconds - (time.perf_counter() - started)
            if seconds < least_seconds(job):
                results.add(job.name, {"left_out": "the time was up"})
                continue
        print(f"{job.name}: about {job_seconds(job):.0f} s", flush=True)
        process.run(job.within(seconds), partial(results.add, job.name))
    print(markdown(results.values))
    unfinished = jobs(options.models, options.providers, settings, results.lanes)
    return UNFINISHED if unfinished else DONE


def _names(known: Collection[str]) -> Callable[[str], list[str]]:
    def read(text: str) -> list[str]:
        names = text.split(",")
        unknown = [name for name in names if name not in known]
        if unknown:
            raise argparse.ArgumentTypeError(f"must be of {', '.join(known)}, got {unknown}")
        return names

    return read


def _lengths(text: str) -> tuple[int, ...]:
    lengths = tuple(sorted({int(part) for part in text.split(",")}))
    if lengths[0] < 1:
        raise argparse.ArgumentTypeError(f"must be positive, got {lengths[0]}")
    return lengths


if __name__ == "__main__":
    raise SystemExit(main())
