"""The manual's pages, and what is read out of them."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
MODEL = "Qwen/Qwen2.5-0.5B-Instruct"  # in pages and docstrings; the tests have a tiny one
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.M | re.S)


def name_of(page: Path) -> str:
    """Return a page's path under ``docs``."""
    return str(page.relative_to(DOCS))


def entries() -> list[str]:
    """Return the names that the pages of the API show."""
    return [name for page in PAGES for name in re.findall(r"^::: (\S+)", page.read_text(), re.M)]


def blocks(page: Path, language: str) -> list[tuple[int, str]]:
    """Return the code blocks of a language: the number of the line before each, and its text."""
    text = page.read_text()
    found = FENCE.finditer(text)
    return [(text[: m.start()].count("\n") + 1, m[2]) for m in found if m[1] == language]


def prose(page: Path) -> str:
    """Return a page without its code blocks."""
    return FENCE.sub("", page.read_text())


def code(text: str) -> list[str]:
    """Return what stands between single backticks."""
    return re.findall(r"`([^`\n]+)`", text)
