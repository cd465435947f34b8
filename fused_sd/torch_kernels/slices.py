"""Consecutive slices of a range: how every loop over tokens or rows is cut."""

from collections.abc import Iterator


def slices(start: int, stop: int, size: int) -> Iterator[slice]:
    """Consecutive slices of at most ``size`` elements that cover ``start`` to ``stop``."""
    for at in range(start, stop, size):
        yield slice(at, min(at + size, stop))
