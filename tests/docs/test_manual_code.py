"""The manual's Python runs: each page's blocks one after the other, on a tiny model."""

import sys
import types

import pytest
from manual import MODEL, PAGES, blocks, name_of

WITH_CODE = [page for page in PAGES if blocks(page, "python")]


@pytest.mark.parametrize("page", WITH_CODE, ids=name_of)
def test_the_code_of_a_page_runs(page, home, monkeypatch):
    module = types.ModuleType("page")  # dataclasses look up the module of a class
    monkeypatch.setitem(sys.modules, "page", module)
    for line, text in blocks(page, "python"):
        text = text.replace(MODEL, str(home)).replace("max_new_tokens=512", "max_new_tokens=6")
        exec(compile("\n" * line + text, str(page), "exec"), vars(module))
