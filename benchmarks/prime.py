"""Compile the kernels for a GPU that is not here, into Triton's cache, which can be carried there.

    TRITON_CACHE_DIR=build/triton python -m benchmarks.prime              for an H100 or H200
    TRITON_CACHE_DIR=build/triton python -m benchmarks.prime --arch 100

The cache's keys hold sources, options and the versions of Triton and its compiler, but no paths: a
machine with the same Python, PyTorch and Triton finds what it needs, and compiles nothing of what
was compiled here.  After a change of a kernel's file its entries are useless, and harmless.
"""

import argparse
import contextlib
import os
import sys
from collections.abc import Sequence

import torch

from benchmarks.tune import CANDIDATES, VOCABULARIES, make_tasks
from fused_sd import checks
from fused_sd.kernels.tuning import forced

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
NUM_ROWS = 512
ROW_PROGRAMS = (
    *("log_normalizer", "normalizers", "divergence", "divergence_gradient", "softmax_gradient"),
    *("row_metrics", "block_maxima", "block_statistics"),
)


def prime(arch: int) -> int:
    """Compile every program, and the candidates of ``tune``; return the number of launches."""
    from triton.backends.compiler import GPUTarget

    from benchmarks.offline import compiling, launch_all

    with compiling(GPUTarget("cuda", arch, 32)) as compiled:
        launch_all(VOCABULARIES[0], DTYPES)
        for candidate in CANDIDATES:
            with contextlib.ExitStack() as launches:
                for program in ROW_PROGRAMS:
                    launches.enter_context(forced(program, candidate))
                for task in make_tasks(NUM_ROWS, VOCABULARIES[0], torch.device("meta")):
                    task.run()
    return len(compiled)


def main(arguments: Sequence[str] | None = None) -> int:
    """Compile, and return the exit status: 0, or 2 for wrong use."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.prime")
    parser.add_argument("--arch", type=int, default=90, help="compute capability (default 90)")
    options = parser.parse_args(arguments)
    try:
        folder = os.environ.get("TRITON_CACHE_DIR")
        if folder is None:
            checks.fail("TRITON_CACHE_DIR", "name a folder", "none", "set it to a new folder")
        if os.environ.get("TRITON_INTERPRET"):
            checks.fail("TRITON_INTERPRET", "be unset", "a value", "interpreted kernels are none")
    except ValueError as error:
        print(f"benchmarks.prime: {error}", file=sys.stderr)
        return 2
    print(f"{prime(options.arch)} launches compiled for sm_{options.arch} into {folder}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
