"""The part of a Markdown file that a program writes, between two markers."""

import os
import re
from collections.abc import Iterable
from pathlib import Path

from fused_sd import checks

END = "<!-- end -->"


class Block:
    """The lines of a file between ``<!-- NAME: ... -->`` and the next ``<!-- end -->``.

    Args:
        path: the file.
        name: the name in the first marker.

    Raises:
        ValueError: the file has no such block.
    """

    def __init__(self, path: Path, name: str) -> None:
        self.path = path
        try:
            text = path.read_text(encoding="utf-8") if path.is_file() else ""
        except (OSError, ValueError) as error:
            got = f"{str(path)!r} ({error})"
            checks.fail("--update", "name a readable text file", got, "check the name")
        pattern = f"<!-- {re.escape(name)}:[^\n]*(\n.*?){re.escape(END)}"
        match = re.search(pattern, text, re.DOTALL)
        if match is None:
            checks.fail(
                "--update",
                f"name a file with a line '<!-- {name}: ... -->' and a line {END!r} below it",
                repr(str(path)),
                "add the two lines where the table belongs",
            )
        assert match is not None
        if not os.access(path, os.W_OK):  # numbers that took minutes would be lost
            checks.fail("--update", "name a file that can be written", repr(str(path)), "chmod u+w")
        self.before, self.after = text[: match.start(1)], text[match.end(1) :]

    def fill(self, lines: Iterable[str]) -> None:
        """Replace the lines of the block."""
        body = "\n".join(lines).rstrip()
        self.path.write_text(f"{self.before}\n\n{body}\n\n{self.after}", encoding="utf-8")
