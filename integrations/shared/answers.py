"""What a completion says as its final answer, and which of its tokens stand between two tags."""

import re
from collections.abc import Sequence
from itertools import accumulate


def boxed_answer(text: str) -> str | None:
    r"""Return what stands in the last ``\boxed{...}`` of a text, or None without a whole one."""
    _, found, behind = text.rpartition("\\boxed")
    if not found or not behind.startswith("{"):
        return None
    for end, depth in enumerate(accumulate((c == "{") - (c == "}") for c in behind)):
        if depth == 0:
            return behind[1:end].strip()
    return None


def tokens_between(pieces: Sequence[str], opening: str, closing: str) -> list[bool]:
    """Return of each token whether it stands between an opening tag and a closing one.

    A token that holds a part of a tag is outside, as the tags are.  Without a closing tag all that
    follows is inside.

    Args:
        pieces: the text of each token.
        opening: such as ``"<thought>"``.
        closing: such as ``"</thought>"``.
    """
    ends = list(accumulate(map(len, pieces)))
    pattern = f"{re.escape(opening)}(.*?)(?:{re.escape(closing)}|\\Z)"
    spans = [found.span(1) for found in re.finditer(pattern, "".join(pieces), re.DOTALL)]
    return [
        any(start <= end - len(piece) and end <= stop for start, stop in spans)
        for piece, end in zip(pieces, ends)
    ]
