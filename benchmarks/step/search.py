"""The longest response that fits: doubling, then bisection."""

import math
from collections.abc import Callable, Generator
from typing import NamedTuple


class Bracket(NamedTuple):
    """What is known of the longest response, in tokens.

    Attributes:
        fits: the longest that did; 0: none.
        fails: the shortest that did not; None: none was too long.
        complete: whether the two are as close as asked for, or ``fits`` is as far as was asked.
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
    """Yields lengths and is sent whether they fit.

    Args:
        known: from lengths that were measured already.
        first: where to start if nothing is known.
        cap: no longer one is tried.
        precision: the bracket's ends differ by at most this share of the lower one.
        may_try: whether there is time for a length; the search ends where there is not.
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
