"""Markdown that all reports share: tables, the line about the machine, blocks of the README."""

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from fused_sd import checks
from fused_sd.bench.providers import PROVIDERS

END = "<!-- end -->"
ABSENT = "not installed"


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


class Block:
    """The part of a file between ``<!-- NAME: ... -->`` and the next ``<!-- end -->``.

    Args:
        path: The file.
        name: The name in the first marker.

    Raises:
        ValueError: The file has no such block.
    """

    def __init__(self, path: Path, name: str) -> None:
        self.path = path
        text = path.read_text(encoding="utf-8") if path.is_file() else ""
        pattern = f"<!-- {re.escape(name)}:[^\n]*(\n.*?){re.escape(END)}"
        match = re.search(pattern, text, re.DOTALL)
        if match is None:
            checks.fail(
                "--update-readme",
                f"name a file with a line '<!-- {name}: ... -->' and a line {END!r} below it",
                repr(str(path)),
                "add the two lines where the tables belong",
            )
        assert match is not None
        self.before, self.after = text[: match.start(1)], text[match.end(1) :]

    def fill(self, lines: Iterable[str]) -> None:
        """Replace what stands in the block."""
        body = "\n".join(lines).rstrip()
        self.path.write_text(f"{self.before}\n\n{body}\n\n{self.after}", encoding="utf-8")
