"""Filters for responses that make bad training data: replies to a user, and loops."""

import re
from collections.abc import Sequence

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


def trim_repeats(
    ids: Sequence[int], *, min_block: int = 4, max_block: int = 512, min_copies: int = 3
) -> list[int]:
    """Reduce a block that a sequence repeats until its end to one copy.

    Args:
        ids: tokens.
        min_block, max_block: the shortest and the longest block that counts as a loop, in tokens.
            The official code has 10 and 1500 characters.
        min_copies: the number of copies from which on a block counts as a loop.

    Returns:
        The shortest beginning of ``ids`` that is followed by nothing but copies of its end.
    """
    kept = list(ids)
    while (length := _length_without_loop(kept, min_block, max_block, min_copies)) < len(kept):
        kept = kept[:length]
    return kept


def _length_without_loop(ids: list[int], min_block: int, max_block: int, min_copies: int) -> int:
    """Return the length up to the first copy of the shortest loop, or the whole length."""
    length = len(ids)
    for block in range(min_block, min(max_block, length // min_copies) + 1):
        start = length - block
        while start > 0 and ids[start - 1] == ids[start - 1 + block]:
            start -= 1
        if length - start >= min_copies * block:
            return start + block
    return length
