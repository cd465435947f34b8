"""Lines of Markdown tables."""

from collections.abc import Sequence


def line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def ruler(texts: int, columns: int) -> str:
    """Below the headings: the first columns hold texts, the others numbers."""
    return line([*["---"] * texts, *["---:"] * (columns - texts)])
