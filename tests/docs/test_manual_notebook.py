"""The manual's notebook is committed as it was written, and its model learns."""

import json
import sys
import types

import pytest
from manual import DOCS

CELLS = json.loads((DOCS / "notebook.ipynb").read_text())["cells"]
CODE = [cell for cell in CELLS if cell["cell_type"] == "code"]


def test_it_holds_no_outputs_and_no_long_lines():
    assert not [cell["id"] for cell in CODE if cell["outputs"] or cell["execution_count"]]
    assert not [line for cell in CELLS for line in cell["source"] if len(line.rstrip()) > 120]


def test_its_model_learns_from_its_own_feedback(monkeypatch):
    for package in ("trl", "peft", "datasets", "matplotlib"):
        pytest.importorskip(package)
    monkeypatch.setenv("MPLBACKEND", "Agg")
    page = types.ModuleType("page")
    monkeypatch.setitem(sys.modules, "page", page)
    for cell in CODE:
        exec(compile("".join(cell["source"]), cell["id"], "exec"), vars(page))
    (_, before), *_, (_, after) = page.curve.points
    assert before < 0.2
    assert after > 0.7
