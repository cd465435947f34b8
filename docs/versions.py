"""The manual's table of versions: what is declared, what the tests pin, and what they ran with.

    python -m docs.versions .venv/bin/python .venv-verl/bin/python

``make versions`` calls it.  Needs Python 3.11, for tomllib.
"""

import re
import subprocess
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

import tomllib

from benchmarks.markdown import table
from fused_sd.measuring.markdown_block import Block

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "reference" / "compatibility.md"
PACKAGES = (
    *("torch", "triton", "transformers", "trl", "peft", "verl"),
    *("liger-kernel", "flash-attn", "pytest-benchmark"),
)
NONE = "-"
REQUIREMENT = re.compile(r"([\w.-]+)(?:\[[^\]]*\])?\s*([^;]*)")
ASK = (
    "import platform, sys\n"
    "from importlib import metadata\n"
    "print(platform.python_version())\n"
    "for name in sys.argv[1:]:\n"
    "    try:\n"
    "        print(metadata.version(name).partition('+')[0])\n"
    "    except metadata.PackageNotFoundError:\n"
    f"        print({NONE!r})\n"
)


def by_name(requirements: Iterable[str]) -> dict[str, str]:
    """Return the versions that requirements ask for, such as ">=2.10", by package."""
    found = (REQUIREMENT.match(line) for line in requirements)
    return {match[1]: match[2].strip() for match in found if match}


def declared() -> dict[str, str]:
    """Return what ``pyproject.toml`` asks of Python and of every package of an extra."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"].values()
    wanted = by_name([*project["dependencies"], *(line for extra in extras for line in extra)])
    return {"Python": project["requires-python"], **wanted}


def pinned() -> dict[str, str]:
    """Return the versions that ``constraints.txt`` fixes."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    fixed = by_name(line for line in lines if not line.startswith("#"))
    return {name: version.removeprefix("==") for name, version in fixed.items()}


def installed(python: str) -> dict[str, str]:
    """Return the versions in the environment of an interpreter."""
    run = subprocess.run([python, "-c", ASK, *PACKAGES], capture_output=True, text=True, check=True)
    return dict(zip(("Python", *PACKAGES), run.stdout.split(), strict=True))


def rows(*environments: Mapping[str, str]) -> list[list[str]]:
    """Return the table's rows: a name, what is declared and pinned, and what each ran with."""
    columns = declared(), pinned(), *environments
    return [
        [name, *(column.get(name, NONE) for column in columns)] for name in ("Python", *PACKAGES)
    ]


def main(pythons: list[str]) -> None:
    """Write the table into the manual's page."""
    headings = ("package", "declared", "pinned", "ran, `.venv`", "ran, `.venv-verl`")
    Block(PAGE, "versions").fill(table(headings, rows(*map(installed, pythons)), texts=5))


if __name__ == "__main__":
    main(sys.argv[1:])
