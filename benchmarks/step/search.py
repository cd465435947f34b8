"""A search for the longest response that fits into memory: doubling, then bisection."""

import math
from collections.abc import Callable, Generator
from typing import NamedTuple


class Bracket(NamedTuple):
    """Lengths between which the longest response that fits must lie, in tokens.

    Attributes:
        fits: The longest length that did fit; 0: none did.
        fails: The shortest length that did not fit; None: every length did.
        complete: Whether ``fits`` and ``fails`` are close enough, or ``fits`` has reached the cap.
    """

    fits: int
    fails: int | None
    complete: bool


def longest(
    known: Bracket,
    *,
    first: int,
    cap: int,
    precision: float,
    may_try: Callable[[int], bool],
) -> Generator[int, bool, Bracket]:
    """Yield the lengths to try; the caller sends back whether each one fits.

    Args:
        known: The bracket from earlier measurements.
        first: The first length, if nothing is known.
        cap: The largest length to try.
        precision: The search ends when ``fails - fits`` is at most this share of ``fits``.
        may_try: Says whether there is time for a length; the search ends if there is not.

    Returns:
        The bracket at the end.
    """
    fits, fails = known.fits, known.fails
    while True:
        if fails is None:
            if fits >= cap:
                return Bracket(fits, fails, True)
            length = min(cap, 2 * fits if fits else first)
        elif fails - fits <= max(1, math.floor(precision * fits)):
            return Bracket(fits, fails, True)
        else:
            length = (fits + fails) // 2
        if not may_try(length):
            return Bracket(fits, fails, False)
        if (yield length):
            fits = length
        else:
            fails = length
