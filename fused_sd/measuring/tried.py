"""The sets of versions that the tests ran with, and how an installed set compares with them.

``tried.jsonl`` holds one set a line; ``python -m docs.try_versions`` adds to it.
"""

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

STORED = Path(__file__).with_name("tried.jsonl")
PACKAGES = ("torch", "triton", "transformers", "trl", "peft", "verl")
SEE = "see docs/reference/compatibility.md"


class Tried(NamedTuple):
    """A set of versions and what the tests made of it.

    Attributes:
        versions: Of Python, by the name "python", and of each of ``PACKAGES`` that was installed.
        platform: The system and the kind of processor.
        tests: How many tests "passed", "failed" and were "skipped", by the name of the selection:
            "smoke", "compile" or "whole".
    """

    versions: dict[str, str]
    platform: str
    tests: dict[str, dict[str, int]]

    def failed(self) -> int:
        """Return how many tests that compute failed; those that compile also refuse slow code."""
        return sum(counts["failed"] for name, counts in self.tests.items() if name != "compile")


def load(path: Path = STORED) -> list[Tried]:
    """Return the stored sets."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return [Tried(**json.loads(line)) for line in lines]


def store(row: Tried, path: Path = STORED) -> None:
    """Add a set to the stored ones; an earlier result of the same selection is replaced."""
    rows = {tuple(sorted(old.versions.items())): old for old in load(path)}
    key = tuple(sorted(row.versions.items()))
    if key in rows:
        row = row._replace(tests=rows[key].tests | row.tests)
    rows[key] = row
    ordered = sorted(rows.values(), key=lambda row: [*map(_order, _in_columns(row))], reverse=True)
    path.write_text("".join(json.dumps(row._asdict()) + "\n" for row in ordered), encoding="utf-8")


def verdict(versions: Mapping[str, str], rows: Iterable[Tried]) -> str:
    """Say in a line whether a set of versions was tried.

    Args:
        versions: Of Python, by the name "python", and of those of ``PACKAGES`` that are installed.
        rows: The sets that were tried.
    """
    # a set that passed comes first: what is not installed may differ
    rows = sorted(rows, key=Tried.failed)
    found = {name: _comparable(name, version) for name, version in versions.items()}
    for row in rows:
        theirs = {name: _comparable(name, version) for name, version in row.versions.items()}
        if found.items() <= theirs.items():
            failed = row.failed()
            return f"together, and {failed} tests failed; {SEE}" if failed else "together"
    passed = [row for row in rows if not row.failed()]
    beyond = [said for name in found if (said := _beyond(name, found[name], passed))]
    if beyond:
        return f"no: {', '.join(beyond)}; {SEE}"
    return f"not together: each is one that was, or lies between two; {SEE}"


def _beyond(name: str, version: str, rows: Iterable[Tried]) -> str | None:
    """Say how a version lies outside those that passed; return None if it is between them."""
    known = sorted(
        (_comparable(name, row.versions[name]) for row in rows if name in row.versions), key=_order
    )
    if not known:
        return f"{name} was not installed"
    if _order(version) > _order(known[-1]):
        return f"{name} {version} is newer than {known[-1]}"
    if _order(version) < _order(known[0]):
        return f"{name} {version} is older than {known[0]}"
    return None


def _comparable(name: str, version: str) -> str:
    """Return a version without its build, such as +cpu, and Python's without its last number."""
    return ".".join(version.split(".")[:2]) if name == "python" else version.partition("+")[0]


def _order(version: str) -> tuple[int, ...]:
    """Return the numbers of a release, by which versions are ordered."""
    found = re.match(r"\d+(?:\.\d+)*", version)
    return tuple(map(int, found[0].split("."))) if found else ()


def _in_columns(row: Tried) -> list[str]:
    """Return the versions in the order of the table's columns."""
    return [row.versions.get(name, "") for name in ("python", *PACKAGES)]
