"""The manual builds without a warning, and a browser that reads it fetches nothing."""

import importlib.util
import re
import subprocess
import sys

import pytest
from manual import PAGES, ROOT, name_of

NEEDED = ("mkdocs", "material", "mkdocstrings", "mkdocstrings_handlers", "nbconvert", "ipykernel")
FETCHED = re.compile(r"<(?:script|link|img|iframe)\b[^>]*?(?:src|href)=\"?(?:https?:)?//[^>]*>")


@pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in NEEDED), reason="make docs installs it"
)
def test_the_site_builds_strictly_and_fetches_nothing(tmp_path):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-q", "-d", str(tmp_path)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    pages = {
        str(html.relative_to(tmp_path).with_suffix(".md")) for html in tmp_path.rglob("*.html")
    }
    assert {name_of(page) for page in PAGES} | {"notebook.md"} < pages
    for html in tmp_path.rglob("*.html"):
        assert not FETCHED.findall(html.read_text()), html
    for style in tmp_path.rglob("*.css"):
        assert not re.findall(r"(?:@import|url\()\s*[\"']?(?:https?:)?//", style.read_text())
