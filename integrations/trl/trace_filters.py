"""Filters for responses that make bad training data: replies to a user, loops, what follows a stop.

They drop whole tokens.  ``official_stages`` has the official code's, which cut text.
"""

import bisect
import re
from collections.abc import Callable, Sequence
from typing import TypeVar

Item = TypeVar("Item")
MAX_LOOPS = 5  # loops of different lengths that are cut, one behind the other

SYCOPHANTIC = re.compile(
    r"\s*(?:(?:yes|indeed)\W+)?"
    r"(?:you(?:'|\u2019| a)re (?:absolutely )?right\b"
    r"|thank you for\b"
    r"|great question\b"
    r"|(?:good|nice) (?:catch|point|observation)\b)",
    re.IGNORECASE,
)


def is_sycophantic(text: str) -> bool:
    """Return whether a text opens by answering somebody.

    There is nobody to answer: the verdict that the model reads is written into its own turn.
    """
    return SYCOPHANTIC.match(text) is not None


def before_stop(
    ids: Sequence[int], stop_strings: Sequence[str], decode: Callable[[list[int]], str]
) -> list[int]:
    """Return the tokens before the one in which the first stop string begins."""
    kept = list(ids)
    text = decode(kept)
    starts = [text.find(stop) for stop in stop_strings if stop in text]
    if not starts:
        return kept
    # the longest beginning whose text ends where the stop string begins, or earlier
    counts = range(len(kept) + 1)
    length = bisect.bisect_right(counts, min(starts), key=lambda n: len(decode(kept[:n])))
    return kept[: length - 1]


def trim_repeats(
    items: Sequence[Item], *, min_block: int = 4, max_block: int = 512, min_copies: int = 3
) -> list[Item]:
    """Reduce a block that a sequence repeats until its end to one copy.

    Args:
        items: tokens, or characters.
        min_block, max_block: the shortest and the longest block that counts as a loop.
        min_copies: the number of copies from which on a block counts as a loop.

    Returns:
        The beginning of ``items`` that is followed by nothing but copies of its end.
    """
    kept = list(items)
    for _ in range(MAX_LOOPS):
        kept = kept[: _length_without_loop(kept, min_block, max_block, min_copies)]
    return kept


def _length_without_loop(ids: list[Item], min_block: int, max_block: int, min_copies: int) -> int:
    """Return the length up to the first copy of the shortest loop, or the whole length."""
    length = len(ids)
    for block in range(min_block, min(max_block, length // min_copies) + 1):
        start = length - block
        while start > 0 and ids[start - 1] == ids[start - 1 + block]:
            start -= 1
        if length - start >= min_copies * block:
            return start + block
    return length
