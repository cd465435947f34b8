"""Markdown that all reports share: tables, and the line about the machine."""

from collections.abc import Iterable, Mapping, Sequence

from fused_sd.bench.providers import PROVIDERS
from fused_sd.measuring.environment import ABSENT


def line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def ruler(texts: int, columns: int) -> str:
    """Return the line below the headings: the first columns hold texts, the others numbers."""
    return line([*["---"] * texts, *["---:"] * (columns - texts)])


def table(headings: Sequence[str], rows: Iterable[Sequence[str]], texts: int = 1) -> list[str]:
    """Return a table's lines; the first ``texts`` columns are aligned on the left."""
    return [line(headings), ruler(texts, len(headings)), *map(line, rows)]


def environment_line(facts: Mapping[str, str]) -> str:
    """Return the device, the installed packages that matter and the commit of stored results."""
    peers = sorted({provider.package for provider in PROVIDERS if provider.package})
    names = ("driver", "torch", "triton", "transformers", "peft", *peers)
    known = [f"{name} {facts[name]}" for name in names if facts.get(name, ABSENT) != ABSENT]
    return f"{facts['device']}; {', '.join(known)}; commit {facts['commit']}"
