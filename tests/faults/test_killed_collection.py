"""A collection of traces that was broken off goes on to the same file, byte by byte."""

import signal

import pytest

pytest.importorskip("trl")

import killed_collection
from killed_collection import FAULTS, QUESTIONS, collect
from killed_runs import code_of

from fused_sd.integrations.trl import load_traces

CODES = {"the model fails": 1, "no room": 1}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_collection_goes_on_to_the_same_file(fault, tmp_path):
    whole, path = tmp_path / "whole", tmp_path / "traces.jsonl"
    whole.mkdir()
    collect(whole)
    assert code_of(killed_collection.collect, tmp_path, fault) == CODES.get(fault, -signal.SIGKILL)
    if fault == "no room":
        said = (tmp_path / "error").read_text()
        assert "File too large; its earlier traces stay" in said
        assert str(path) in said
    kept = load_traces(path).counts.questions
    assert 2 <= kept < len(QUESTIONS), "the first batch is there, whatever happened later"
    collect(tmp_path)
    assert path.read_bytes() == (whole / "traces.jsonl").read_bytes()
    assert load_traces(path).counts.kept == len(QUESTIONS)
