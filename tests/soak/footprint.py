"""What a process holds: memory, tensors, the library's objects, caches, files and threads."""

import ctypes
import functools
import gc
import os
import sys
import threading
from collections import Counter
from collections.abc import Sized
from contextlib import contextmanager
from dataclasses import dataclass

import torch

MIB, KIB = 2**20, 2**10
QUANTILE = 1.96  # of a normal distribution, for intervals of 95 %


@dataclass(frozen=True)
class Footprint:
    """A process at one moment.

    Attributes:
        rss: memory in bytes that no file backs, resident or swapped out, after the allocator has
            given back what is free.  Pages of files come and go with the needs of others.
        tensors: live tensors that Python's collector knows.
        objects: live objects of the library's classes, by class.
        caches: entries of the library's caches and of its modules' containers, by name.
        bounded: the same of caches that drop their oldest entry.
        files: open descriptors.
        threads: of the operating system.
    """

    rss: int
    tensors: int
    objects: Counter
    caches: dict
    bounded: dict
    files: int
    threads: int


@contextmanager
def only_new_objects():
    """Let footprints inside count, and the collector look at, what is made from here on.

    Of the modules of PyTorch and TRL there are a million objects, which take half a second.
    """
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def footprint():
    """Collect garbage, and count what is left."""
    gc.collect()
    with_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if with_trim is not None:
        with_trim(0)
    with open("/proc/self/status") as file:
        sizes = {line.partition(":")[0]: line.split()[1] for line in file if line.endswith(" kB\n")}
    rss = sum(int(sizes[name]) for name in ("RssAnon", "VmSwap")) * KIB
    tensors, objects = 0, Counter()
    for held in gc.get_objects():
        kind = type(held)
        if issubclass(kind, torch.Tensor):
            tensors += 1
        elif str(kind.__module__).partition(".")[0] == "fused_sd":
            objects[f"{kind.__module__}.{kind.__qualname__}"] += 1
    return Footprint(
        rss,
        tensors,
        objects,
        *caches(),
        len(os.listdir("/proc/self/fd")),
        len(os.listdir("/proc/self/task")),
    )


def caches():
    """The sizes of caches and of containers in the library's modules, by their names.

    They are found, not listed: a new cache is measured from its first day.

    Returns:
        Those that could grow for ever, and those that have a bound.
    """
    found, bounded = {}, {}
    for module_name, module in sorted(sys.modules.items()):
        if module_name.partition(".")[0] != "fused_sd" or module is None:
            continue
        for name, value in vars(module).items():
            if isinstance(value, functools._lru_cache_wrapper):
                state = value.cache_info()
                kind = found if state.maxsize is None else bounded
                kind[f"{value.__module__}.{value.__qualname__}"] = state.currsize
            elif is_container(value) and not name.startswith("__"):
                found[f"{module_name}.{name}"] = len(value)
    return found, bounded


def is_container(value):
    return isinstance(value, Sized) and not isinstance(value, str | bytes | type | torch.Tensor)


@dataclass(frozen=True)
class Slope:
    """A line through measurements: its slope, and half the width of the interval of 95 %."""

    value: float
    half_width: float

    @property
    def low(self):
        return self.value - self.half_width

    @property
    def high(self):
        return self.value + self.half_width

    def __str__(self):
        return f"{self.value:+.3f} +- {self.half_width:.3f}"


def slope(xs, ys):
    """Fit a line by least squares."""
    count = len(xs)
    x_mean, y_mean = sum(xs) / count, sum(ys) / count
    spread = sum((x - x_mean) ** 2 for x in xs)
    value = sum((x - x_mean) * (y - y_mean) for x, y in zip(xs, ys, strict=True)) / spread
    rest = sum((y - y_mean - value * (x - x_mean)) ** 2 for x, y in zip(xs, ys, strict=True))
    return Slope(value, QUANTILE * (rest / (count - 2) / spread) ** 0.5)


@dataclass(frozen=True)
class Course:
    """Footprints by the number of steps or calls, after a warm-up."""

    name: str
    at: list
    prints: list

    @property
    def growth(self):
        """MiB by 1000 steps."""
        thousands = [count / 1000 for count in self.at]
        return slope(thousands, [found.rss / MIB for found in self.prints])

    def grown(self):
        """What there is more of in the last footprint than in any of the first half."""
        half = self.prints[: len(self.prints) // 2]
        last = self.prints[-1]
        found = {}
        for name in ("tensors", "files", "threads"):
            most = max(getattr(before, name) for before in half)
            if getattr(last, name) > most:
                found[name] = (most, getattr(last, name))
        for name in ("objects", "caches"):
            for key, count in getattr(last, name).items():
                most = max(getattr(before, name).get(key, 0) for before in half)
                if count > most:
                    found[key] = (most, count)
        return found

    def lines(self):
        """The course in words."""
        first, last = self.prints[0], self.prints[-1]
        return [
            f"{self.name}: {self.at[0]} to {self.at[-1]}, {len(self.at)} footprints",
            f"  memory {first.rss / MIB:.1f} -> {last.rss / MIB:.1f} MiB, "
            f"{self.growth} MiB by 1000",
            f"  tensors {first.tensors} -> {last.tensors}, library's objects "
            f"{first.objects.total()} -> {last.objects.total()}",
            f"  {len(last.caches)} caches and containers, {sum(first.caches.values())} -> "
            f"{sum(last.caches.values())} entries; {len(last.bounded)} with a bound, "
            f"{sum(first.bounded.values())} -> {sum(last.bounded.values())}",
            f"  files {first.files} -> {last.files}, threads {first.threads} -> {last.threads}, "
            f"Python's {threading.active_count()}",
        ]
