"""A loop over blocks of rows that runs on all of PyTorch's threads, a block on one thread.

PyTorch spreads each operation on a CPU over its threads and waits for the last of them.  Hundreds
of short operations are then hundreds of waits, and where another process takes a core away, each
wait is as long as the scheduler pleases.  Here a thread takes a block of rows through all
operations, then the next block that is left, and the threads wait for each other once.  A block is
the same rows and the same sums for any number of threads, so results are the same to the bit.

A thread must then run its operations alone.  OpenMP, which PyTorch uses, and MKL, whose exponential
it calls, keep the number of threads for each thread apart, so no other thread notices.  Where
OpenMP cannot be found (PyTorch for Windows, or built without it), the caller's thread takes all
blocks, and PyTorch spreads each operation as it always does.

Dimension key:  R rows of a block, W columns
"""

import ctypes
import os
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from functools import lru_cache
from threading import Lock
from typing import Any

import torch
from torch import Tensor

from fused_sd.torch_kernels.slices import slices

# numbers in a block: small enough for the caches, and large beside an operation's call from Python,
# which only one thread makes at a time
BLOCK_SIZE = 2**18
GPU_BLOCK_SIZE = 2**26  # launches cost more than memory


def rows_in_block(num_rows: int, width: int, block_size: int = BLOCK_SIZE) -> int:
    """Number of rows that are processed at a time: R."""
    return max(1, min(num_rows, block_size // max(1, width)))


def rows_in_work(num_rows: int, width: int) -> int:
    """Number of rows that a CPU's threads process at a time, each a block."""
    size = rows_in_block(num_rows, width)
    return size * _num_workers(-(-num_rows // size))


def for_row_blocks(matrix: Tensor, num_buffers: int, work: Callable[..., None]) -> None:
    """Call ``work(at, *buffers)`` for slices of rows that cover a matrix, on several threads.

    Args:
        matrix: (C, W).
        num_buffers: how many matrices (R, W), fp32 or as wide as the matrix, a call may write.  The
            next call on the same thread gets the same memory.
        work: writes what belongs to the slice's rows, without autograd.
    """
    num_rows, width = matrix.shape
    size = rows_in_block(num_rows, width, GPU_BLOCK_SIZE if matrix.is_cuda else BLOCK_SIZE)
    blocks = list(slices(0, num_rows, size))
    workers = 1 if matrix.is_cuda else _num_workers(len(blocks))
    wide = torch.promote_types(matrix.dtype, torch.float32)
    memory = matrix.new_empty((workers, num_buffers, size, width), dtype=wide)
    left, lock = iter(blocks), Lock()

    def next_block() -> slice | None:
        with lock:
            return next(left, None)

    def take_blocks(buffers: Tensor) -> None:
        for at in iter(next_block, None):
            work(at, *buffers[:, : at.stop - at.start])

    if matrix.is_cuda or torch.get_num_threads() == 1:
        take_blocks(memory[0])
    else:
        _on_threads(take_blocks, memory)


def _num_workers(num_blocks: int) -> int:
    threads = torch.get_num_threads() if _openmp() is not None else 1
    return max(1, min(threads, num_blocks))


def _on_threads(run: Callable[[Tensor], None], memory: Tensor) -> None:
    """Call ``run`` on this thread and on helpers, each with memory of its own."""
    rounds_to_zero = (
        torch.full((), 1e-40, dtype=torch.float32).item() == 0
    )  # a setting of each thread

    def help_with(buffers: Tensor) -> None:
        torch.set_flush_denormal(rounds_to_zero)
        with _alone(), torch.inference_mode():
            run(buffers)

    threads = torch.get_num_threads()
    jobs: list[Future[None]] = []
    with _alone():
        with suppress(RuntimeError):  # where the interpreter is ending, no thread starts
            jobs.extend(_helpers(threads - 1).submit(help_with, own) for own in memory[1:])
        try:
            run(memory[0])
        finally:
            begun = [job for job in jobs if not job.cancel()]
            wait(begun)
    for job in begun:
        job.result()


@lru_cache
def _helpers(count: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(count, "fused_sd", initializer=_start_helper)


if hasattr(os, "register_at_fork"):  # a child has none of its parent's threads
    os.register_at_fork(after_in_child=_helpers.cache_clear)


def _start_helper() -> None:
    """Let this thread run on every core that a thread of the process may use.

    ``OMP_PROC_BIND`` ties a program's first thread to one core, which a new thread would share.
    """
    if hasattr(os, "sched_setaffinity"):
        with suppress(OSError):  # a thread may end while it is asked
            tasks = [int(task) for task in os.listdir("/proc/self/task")]
            os.sched_setaffinity(0, set().union(*map(os.sched_getaffinity, tasks)))


@contextmanager
def _alone() -> Iterator[None]:
    """Run this thread's operations on this thread alone.

    ``torch.set_num_threads`` would set the number for other threads, too.
    """
    threads, libraries = torch.get_num_threads(), _openmp()
    if libraries is None:
        yield
        return
    has_mkl = hasattr(libraries, "MKL_Set_Num_Threads_Local")
    libraries.omp_set_num_threads(1)
    before = libraries.MKL_Set_Num_Threads_Local(1) if has_mkl else 0
    try:
        yield
    finally:
        libraries.omp_set_num_threads(threads)
        if has_mkl:
            libraries.MKL_Set_Num_Threads_Local(before)


@lru_cache
def _openmp() -> Any:
    """PyTorch's libraries with OpenMP's functions among them; None: it has no OpenMP."""
    libraries = ctypes.CDLL(torch._C.__file__)  # finds what the libraries that it needs export
    return libraries if hasattr(libraries, "omp_set_num_threads") else None
