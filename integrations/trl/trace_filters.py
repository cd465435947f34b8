"""Which responses make bad training data: replies to a user, and loops."""

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
    """Whether a text opens by answering somebody, as no model alone with itself would."""
    return SYCOPHANTIC.match(text) is not None


def trim_repeats(
    ids: Sequence[int], *, min_block: int = 4, max_block: int = 512, min_copies: int = 3
) -> list[int]:
    """Cut the copies that a sequence repeats until its end down to one.

    Args:
        ids: tokens.
        min_block, max_block: lengths of a block that count as a loop, in tokens.  The official
            code's are 10 and 1500 characters.
        min_copies: how often it has to be there.

    Returns:
        The shortest beginning of ``ids`` after which nothing but the same block comes.
    """
    kept = list(ids)
    while (length := _length_without_loop(kept, min_block, max_block, min_copies)) < len(kept):
        kept = kept[:length]
    return kept


def _length_without_loop(ids: list[int], min_block: int, max_block: int, min_copies: int) -> int:
    length = len(ids)
    for block in range(min_block, min(max_block, length // min_copies) + 1):
        start = length - block
        while start > 0 and ids[start - 1] == ids[start - 1 + block]:
            start -= 1
        if length - start >= min_copies * block:
            return start + block
    return length
