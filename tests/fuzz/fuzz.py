"""Random calls of the library, each made again by one number.

    python tests/fuzz/fuzz.py --cases 20000 --seed 0         # all areas, in a fixed mixture
    python tests/fuzz/fuzz.py --area losses --case 1234      # one case, as code, and why it fails

losses: a public loss on drawn tensors and settings, value and gradients against float64.
relations: two calls whose results are related, such as a batch and its parts.
junk: a legal call with one argument spoiled: it works, or we refuse it with a remedy.
texts: alignment, thoughts, prompts and traces of drawn conversations.
kernels: losses through Triton's programs, in its interpreter; a process of its own.
ranks: losses on heads that 1, 2 and 4 processes share; processes of their own.

The exit status is 1 if a case fails.
"""

import argparse
import importlib
import os
import sys
import time
import traceback
from collections import Counter
from collections.abc import Sequence
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "support"), str(Path(__file__).parent)]
# cases of an area in a hundred
SHARES = {"losses": 45, "relations": 8, "junk": 25, "texts": 20, "kernels": 1, "ranks": 1}
SHOWN = 20  # failures that are printed as code


class Result(NamedTuple):
    """What a run of consecutive cases of an area has found."""

    failures: list[tuple[int, list[str]]]  # case, sentences
    counts: Counter[str]


def area_module(area: str) -> Any:
    """The area's ``check`` and ``code``, with the environment that it needs."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    if area == "kernels":
        os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is defined
    import torch

    torch.set_num_threads(1)
    name = "losses" if area == "kernels" else area
    module = importlib.import_module(f"fuzz_{name}")
    if area == "kernels":
        import numpy
        from interpreter import compute_as_a_gpu

        numpy.seterr(all="ignore")  # the interpreter computes both branches of a select
        if not torch.cuda.is_available():
            compute_as_a_gpu()
    return module


def functions(area: str) -> tuple[Any, Any, Counter[str]]:
    """``check`` and ``code`` of one case, and the area's counts."""
    module = area_module(area)
    counts = getattr(module, "counts", Counter())
    if area != "kernels":
        return module.check, module.code, counts
    return partial(module.check, backend="triton"), partial(module.code, backend="triton"), counts


def run(area: str, cases: Sequence[int]) -> Result:
    """Check the cases of an area one after the other."""
    if area == "ranks":
        return Result(*area_module(area).check_all(cases))
    check, _, counts = functions(area)
    counts.clear()
    failures = []
    for case in cases:
        try:
            found = check(case)
        except Exception as error:
            at = traceback.extract_tb(error.__traceback__)[-1]
            found = [f"{type(error).__name__}: {error} ({Path(at.filename).name}:{at.lineno})"]
        if found:
            failures.append((case, found))
    return Result(failures, Counter(counts))


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--cases", type=int, default=20000, help="of all areas together")
    parser.add_argument("--seed", type=int, default=0, help="the first case's number")
    parser.add_argument("--jobs", type=int, default=1, help="processes at a time")
    parser.add_argument("--area", choices=SHARES, help="this area alone")
    parser.add_argument("--case", type=int, help="one case of --area")
    chosen = parser.parse_args()
    if chosen.case is not None:
        if chosen.area is None:
            parser.error("--case needs --area")
        return show(chosen.area, chosen.case)
    areas = {chosen.area: 100} if chosen.area else SHARES
    pieces = []
    for area, share in areas.items():
        count = chosen.cases * share // 100
        for part in range(chosen.jobs if area != "ranks" else 1):
            step = chosen.jobs if area != "ranks" else 1
            pieces.append((area, range(chosen.seed + part, chosen.seed + count, step)))
    num_failures = 0
    totals: Counter[str] = Counter()
    print(f"{'area':12}{'cases':>8}{'failures':>10}{'seconds':>9}", flush=True)
    for area in areas:
        mine, began = [piece for piece in pieces if piece[0] == area], time.perf_counter()
        if area == "ranks":
            results = [run(*piece) for piece in mine]
        else:  # what an area imports and sets must not reach the others
            with get_context("spawn").Pool(chosen.jobs) as pool:
                results = pool.starmap(run, mine)
        failures = sorted(failure for result in results for failure in result.failures)
        number, took = sum(len(cases) for _, cases in mine), time.perf_counter() - began
        print(f"{area:12}{number:8}{len(failures):10}{took:9.0f}", flush=True)
        for case, found in failures[:SHOWN]:
            print(f"  --area {area} --case {case}: {'; '.join(found)[:400]}", flush=True)
        num_failures += len(failures)
        totals.update(sum((result.counts for result in results), Counter()))
    for what, count in totals.items():
        print(f"{count:8} {what}")
    return int(num_failures > 0)


def show(area: str, case: int) -> int:
    """Print one case as code, shrunk if it fails, and its failures."""
    failures = run(area, [case]).failures
    _, code, _ = functions(area)
    print(code(case))
    for _, found in failures:
        print(*found, sep="\n")
    return int(bool(failures))


if __name__ == "__main__":
    sys.exit(main())
