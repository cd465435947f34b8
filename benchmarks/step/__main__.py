"""``python -m benchmarks.step``: plan, measure process by process, write after every finding.

Exit status: 0; 2 for wrong use; 3 when something is still to be measured.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.step import process
from benchmarks.step.plan import Settings, job_seconds, jobs, least_seconds
from benchmarks.step.providers import PROVIDERS
from benchmarks.step.report import markdown
from benchmarks.step.results import Results
from benchmarks.step.sizes import SIZES
from fused_sd.measuring.environment import default_device

DONE, MISUSED, UNFINISHED = 0, 2, 3


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.step",
        description="A whole SDPO step: TRL's trainers and fused_sd's on the same batch.",
    )
    parser.add_argument("--models", type=_names(SIZES), default=list(SIZES)[:3])
    parser.add_argument("--lengths", type=_lengths, default=(4096, 16384, 32768, 65536))
    parser.add_argument("--providers", type=_names(PROVIDERS), default=list(PROVIDERS))
    parser.add_argument("--out", type=Path, required=True, help="folder of step.json and step.md")
    parser.add_argument("--resume", action="store_true", help="keep what is there already")
    parser.add_argument("--budget-seconds", type=float, help="leave out what does not fit in")
    parser.add_argument("--steps", type=int, default=3, help="timed for each length (default 3)")
    parser.add_argument("--row-tokens", type=int, default=8192, help="longest response of a row")
    parser.add_argument(
        "--longest-cap",
        type=int,
        help="how far the longest response is searched; 0: not at all (default: twice the longest "
        "of --lengths; on the CPU 0 without --memory-limit)",
    )
    parser.add_argument("--precision", type=float, default=0.06, help="of that search (0.06)")
    parser.add_argument("--memory-limit", type=float, help="GiB that a step may hold at most")
    parser.add_argument("--commit", help="to be written down, for a copy without .git")
    parser.add_argument("--device", choices=("cpu", "cuda"), default=default_device().type)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), help="default: bf16 on a GPU")
    chosen = parser.parse_args(arguments)
    bounded = chosen.device == "cuda" or chosen.memory_limit is not None
    if chosen.longest_cap is None:
        chosen.longest_cap = 2 * chosen.lengths[-1] if bounded else 0
    if chosen.longest_cap and not bounded:
        parser.error("--longest-cap on the CPU must come with --memory-limit, got none; pass both")
    if chosen.steps < 1:
        parser.error(f"--steps must be at least 1, got {chosen.steps}; leave it out for 3")
    return chosen


def settings_of(chosen: argparse.Namespace) -> Settings:
    limit = chosen.memory_limit
    return Settings(
        device=chosen.device,
        dtype=chosen.dtype or ("bfloat16" if chosen.device == "cuda" else "float32"),
        lengths=chosen.lengths,
        steps=chosen.steps,
        row_tokens=chosen.row_tokens,
        longest_cap=chosen.longest_cap,
        precision=chosen.precision,
        memory_limit=None if limit is None else int(limit * 2**30),
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure; returns the exit status."""
    chosen = parse(arguments)
    settings = settings_of(chosen)
    try:
        results = Results(chosen.out, settings, resume=chosen.resume, at_commit=chosen.commit)
    except ValueError as error:
        print(f"benchmarks.step: {error}", file=sys.stderr)
        return MISUSED
    planned = jobs(chosen.models, chosen.providers, settings, results.lanes)
    print(f"{len(planned)} processes, about {sum(map(job_seconds, planned)):.0f} s in all")
    started = time.perf_counter()
    for job in planned:
        left = None
        if chosen.budget_seconds is not None:
            left = chosen.budget_seconds - (time.perf_counter() - started)
            if left < least_seconds(job):
                results.add(job.name, {"left_out": "the time was up"})
                continue
        print(f"{job.name}: about {job_seconds(job):.0f} s", flush=True)
        process.run(job.within(left), partial(results.add, job.name))
    print(markdown(results.document))
    unfinished = jobs(chosen.models, chosen.providers, settings, results.lanes)
    return UNFINISHED if unfinished else DONE


def _names(known: Any) -> Any:
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
