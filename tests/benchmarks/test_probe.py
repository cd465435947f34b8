"""The probe of a GPU: every part runs at small sizes, failures are told, files are continued."""

import json

import pytest

from benchmarks.probe import __main__ as command
from benchmarks.probe.parts import PARTS


@pytest.fixture
def file(tmp_path):
    return tmp_path / "probe.jsonl"


def lines(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_every_part_is_measured(file):
    assert command.main(["--tiny", "--out", str(file)]) == 0
    found = lines(file)
    assert {line["part"] for line in found} == {"environment", *PARTS}
    assert command.whole_parts(file) == set(PARTS)
    by_name = {line["name"]: line for line in found if "name" in line}
    assert {"logits", "dW added", "jsd: loss and gradient", "top_k 100"} <= set(by_name)
    assert by_name["topk_tail, what trainers log"]["peak_GiB"] > 0
    timed = [line for line in by_name.values() if line["part"] in ("gemms", "losses", "chunks")]
    assert all(line["ms"] > 0 for line in timed)


def test_a_part_that_fails_is_told_and_measured_again(file, monkeypatch):
    def broken(probe):
        probe.say(part="copy", TBps=1.0)
        raise RuntimeError("no such thing")

    arguments = ["--tiny", "--out", str(file), "--parts", "copy,logits"]
    with monkeypatch.context() as patch:
        patch.setitem(PARTS, "copy", broken)
        assert command.main(arguments) == 1
    assert {"part": "copy", "failed": "RuntimeError: no such thing"} in lines(file)
    assert command.whole_parts(file) == {"logits"}
    assert command.main([*arguments, "--resume"]) == 0
    ran = [line["part"] for line in lines(file) if line.get("whole")]
    assert ran == ["logits", "copy"]


def test_wrong_use_says_what_to_do(capsys, monkeypatch):
    assert command.main(["--tiny", "--parts", "copies"]) == 2
    assert "--parts must be one of 'copy'" in capsys.readouterr().err
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert command.main([]) == 2
    assert "--tiny must be given where there is no GPU" in capsys.readouterr().err
