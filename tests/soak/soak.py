"""Repeat a trainer's steps and the losses' calls, and refuse what grows.

    python tests/soak/soak.py --steps 2000 --calls 50000

It prints what the process held, and ends with an error where memory rises for certain, or where
there are more tensors, objects, cached entries, files or threads at the end than before.  A trainer
may rise as TRL's own does, which is measured beside it.
"""

import argparse
import os
import sys
import tempfile
import time
import warnings
from functools import partial
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(Path(__file__).parent), str(ROOT), str(ROOT / "tests/support")]
os.environ.setdefault("OMP_NUM_THREADS", "1")

MOST_GROWTH = 0.5  # MiB by 1000 steps or calls that may be noise
NUM_FOOTPRINTS = 30


def findings(course, most=MOST_GROWTH):
    """What is wrong with a course: memory that rises for certain, and what there is more of."""
    found = []
    if course.growth.low > most:
        found.append(f"memory rises by {course.growth} MiB in 1000, more than {most}")
    found += [f"{name}: {most} -> {last}" for name, (most, last) in course.grown().items()]
    return found


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=2000, help="of the trainer")
    parser.add_argument("--calls", type=int, default=50_000, help="of losses")
    given = parser.parse_args(arguments)
    import torch
    from workloads import call_losses

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    wrong = []

    def watched(run, count):
        start = time.monotonic()
        course = run(count, count // 5, max(1, (count - count // 5) // NUM_FOOTPRINTS))
        print(*course.lines(), f"  {time.monotonic() - start:.0f} s", sep="\n", flush=True)
        return course

    if given.calls:
        course = watched(call_losses, given.calls)
        wrong += [f"{course.name}: {found}" for found in findings(course)]
    if given.steps:
        from training import train, train_by_trl

        with tempfile.TemporaryDirectory() as folder:
            theirs = watched(partial(train_by_trl, Path(folder)), given.steps)
            ours = watched(partial(train, Path(folder)), given.steps)
        most = MOST_GROWTH + max(0.0, theirs.growth.high)
        wrong += [f"{ours.name}: {found}" for found in findings(ours, most)]
    print(*wrong or ["nothing grows"], sep="\n")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
