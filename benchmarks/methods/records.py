"""The results of the experiments on disk: a file that only grows, a line for each run.

benchmarks/results/methods/<task>.jsonl

A line holds everything that decided its run.  Runs of several machines and days lie side by side;
a run whose settings have changed since counts as missing.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any


def plain(values: Any) -> Any:
    """Return values as JSON gives them back."""
    return json.loads(json.dumps(values, sort_keys=True, default=str))


def rounded(values: Any) -> Any:
    """Return plain values with five digits behind the point, which is more than a run tells."""
    if isinstance(values, dict):
        return {name: rounded(value) for name, value in values.items()}
    if isinstance(values, list):
        return [rounded(value) for value in values]
    return round(values, 5) if isinstance(values, float) else values


@dataclass(frozen=True)
class Record:
    """A finished run: what decided it, what was measured, and where."""

    decided_by: dict[str, Any]
    values: dict[str, Any]
    stamp: dict[str, str]


class Records:
    """The runs in one file.

    Args:
        path: The file; it need not exist.

    Raises:
        ValueError: A line is no record.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.all: list[Record] = []
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        for number, line in enumerate(lines, 1):
            try:
                self.all.append(Record(**json.loads(line)))
            except (TypeError, json.JSONDecodeError) as error:
                raise ValueError(
                    f"every line must be a whole record, got {line[:40]!r} in line {number} of "
                    f"{path}; delete the line, and the run is made again"
                ) from error

    def find(self, decided_by: dict[str, Any]) -> Record | None:
        """Return the first run that exactly these settings decided; None: there is none."""
        wanted = plain(decided_by)
        return next((record for record in self.all if record.decided_by == wanted), None)

    def add(self, decided_by: dict[str, Any], values: Any, stamp: dict[str, str]) -> None:
        """Append a run."""
        record = Record(plain(decided_by), rounded(plain(values)), stamp)
        self.all.append(record)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record.__dict__, sort_keys=True) + "\n")
