"""Time and peak memory of a function that is run repeatedly.

On a GPU the time is that between CUDA events, and the memory that of PyTorch's allocator.  On a CPU
the memory is added up from the profiler's record of every allocation and release.  That is the
exact counterpart of the GPU's number, without the noise of the process's resident memory.  The
profiler sees the calling thread alone: on several threads, temporaries of the helpers that process
rows beside it are not counted (``torch_kernels/row_blocks.py``); their buffers are.
"""

import gc
import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import NamedTuple

import torch
from torch.profiler import ProfilerActivity, profile

Run = Callable[[], None]
QUIET = "6"  # log level at which the profiler's library does not report each start and stop


class Effort(NamedTuple):
    """How long a function is measured."""

    warm_seconds: float  # seconds of runs before the first timed one
    runs: int
    max_seconds: float = math.inf  # if the runs would take longer, fewer are timed
    least_runs: int = 1  # but never fewer than these


class Times(NamedTuple):
    """Milliseconds of a run: the median, and the 20th and 80th percentiles."""

    p20: float
    p50: float
    p80: float
    runs: int


@contextmanager
def tiny_is_zero() -> Iterator[None]:
    """Round denormal numbers to 0 within the context.

    Denormal numbers cost a GPU nothing and slow a CPU down several times.  Drawn logits lie further
    apart than a model's, so that some of their probabilities are denormal.
    """
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(False)


def warm_up(run: Run, device: torch.device, warm_seconds: float) -> float:
    """Run at least once, and return the seconds of a run."""
    synchronize(device)
    started, count = time.perf_counter(), 0
    while not count or time.perf_counter() - started < warm_seconds:
        run()
        synchronize(device)
        count += 1
    return (time.perf_counter() - started) / count


def affordable(effort: Effort, once: float) -> int:
    """Number of timed runs of a function that takes ``once`` seconds."""
    return max(effort.least_runs, int(min(effort.max_seconds / max(once, 1e-9), effort.runs)))


def timed(run: Run, device: torch.device, count: int) -> list[float]:
    """Milliseconds of runs one after another, without a pause between them."""
    return _on_gpu(run, count) if device.type == "cuda" else _on_cpu(run, count)


def times_of(milliseconds: list[float]) -> Times:
    """Summarise the milliseconds of all runs."""
    p20, p50, p80 = (quantile(milliseconds, share) for share in (0.2, 0.5, 0.8))
    return Times(p20, p50, p80, len(milliseconds))


def _on_gpu(run: Run, count: int) -> list[float]:
    run()  # so that the first timed run is not waited for either
    events = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
    events[0].record()
    for event in events[1:]:
        run()
        event.record()
    torch.cuda.synchronize()
    return [before.elapsed_time(after) for before, after in pairwise(events)]


def _on_cpu(run: Run, count: int) -> list[float]:
    milliseconds = []
    for _ in range(count):
        started = time.perf_counter()
        run()
        milliseconds.append(1e3 * (time.perf_counter() - started))
    return milliseconds


def quantile(values: list[float], share: float) -> float:
    """Return the quantile at ``share``, interpolated linearly between the nearest two values."""
    ranked = sorted(values)
    place = share * (len(ranked) - 1)
    low = math.floor(place)
    high = min(low + 1, len(ranked) - 1)
    return ranked[low] + (place - low) * (ranked[high] - ranked[low])


def peak_bytes(run: Run, device: torch.device) -> int:
    """Return the largest number of bytes that one run holds beyond those held before it."""
    if device.type != "cuda":
        return _peak_of_profile(run)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated(device) - before


def _peak_of_profile(run: Run) -> int:
    os.environ.setdefault("KINETO_LOG_LEVEL", QUIET)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as seen:
        run()
    assert seen.profiler is not None
    assert seen.profiler.kineto_results is not None
    changes = [e for e in seen.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for change in sorted(changes, key=lambda event: event.start_ns()):
        held += change.nbytes()
        peak = max(peak, held)
    return peak


def synchronize(device: torch.device) -> None:
    """Wait for a GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def forget(device: torch.device) -> None:
    """Free cached GPU memory, so that what one provider leaves does not stop the next."""
    if device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()
