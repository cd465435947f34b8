"""Files from outside: what is no file of ours is refused with a ValueError that says so."""

import json
import os
import pickle

import pytest
import torch
from torch import nn

from fused_sd.cli import main
from fused_sd.credit import CreditMap
from fused_sd.credit.tokens import FORMAT
from fused_sd.measuring.head_sizes import head_size
from fused_sd.teaching.teacher import Teacher

DEEP = "[" * 100_000
TOKEN = {
    "token_id": 1,
    "text": "a",
    "student_log_prob": -1,
    "teacher_log_prob": "-inf",
    "forward_kl": 0,
    "reverse_kl": 0,
    "student_entropy": 0,
    "teacher_entropy": 0,
    "student_top": [],
    "teacher_top": [],
}
ROW = {"tokens": [TOKEN], "caption": "c", "student_prompt": "s", "teacher_prompt": "t"}


def map_text(**changes):
    return json.dumps({"format": FORMAT, "title": "x", "rows": [ROW], **changes})


def with_token(**changes):
    return map_text(rows=[{**ROW, "tokens": [{**TOKEN, **changes}]}])


MAPS = {
    "deep": DEEP,
    "empty": "",
    "list": "[]",
    "number": "3",
    "title": map_text(title=3),
    "rows": map_text(rows=None),
    "rows of text": map_text(rows="abc"),
    "caption": map_text(rows=[{**ROW, "caption": ["x"]}]),
    "prompt": map_text(rows=[{**ROW, "student_prompt": None}]),
    "text": with_token(text=5),
    "infinite id": with_token(token_id=float("inf")),
    "large number": with_token(forward_kl=10**400),
    "no number": with_token(reverse_kl="abc"),
    "none": with_token(student_log_prob=None),
    "top": with_token(student_top=[{"token_id": 1, "prob": 0.5}]),
    "top of text": with_token(teacher_top="abc"),
    "missing": map_text(rows=[{"tokens": []}]),
}


@pytest.mark.parametrize("name", MAPS)
def test_credit_maps(name, tmp_path, capsys):
    with pytest.raises(ValueError, match="text must"):
        CreditMap.from_json(MAPS[name])
    (tmp_path / "map.json").write_text(MAPS[name])
    assert main(["credit", str(tmp_path / "map.json")]) == 2
    assert "fused_sd credit: text must" in capsys.readouterr().err


def test_a_credit_map_that_is_no_text(tmp_path, capsys):
    (tmp_path / "map.json").write_bytes(b"\xff\xfe\x00")
    assert main(["credit", str(tmp_path / "map.json")]) == 2
    assert "fused_sd credit:" in capsys.readouterr().err
    assert CreditMap.from_json(with_token()).rows[0].tokens[0].teacher_log_prob == -float("inf")


@pytest.mark.parametrize(
    "text",
    [
        "[]",
        "3",
        DEEP,
        "\0",
        '{"hidden_size": "a", "vocab_size": 3}',
        '{"hidden_size": 1e400, "vocab_size": 3}',
        '{"hidden_size": -5, "vocab_size": 10}',
        '{"hidden_size": true, "vocab_size": 10}',
        '{"hidden_size": [1], "vocab_size": {}}',
    ],
)
def test_configurations(text, tmp_path):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match="must be"):
        head_size(str(tmp_path))


def traces_file(path, *lines, **header):
    config = {"chat_template_kwargs": {}}
    first = {"format": "fused_sd traces 1", "config": config, **header}
    path.write_text("".join(json.dumps(line) + "\n" for line in (first, *lines)))
    return path


TRACE = {
    "question": 0,
    "prompt": "2 + 2 =",
    "prompt_ids": [5, 6],
    "initial_ids": [7],
    "phrase": "Wrong.",
    "verdict_ids": [8],
    "revision_ids": [9, 10],
    "initial_correct": False,
    "initial_reward": 0.0,
    "revision_reward": 1.0,
}


def line(counts=None, **changes):
    return {"question": 0, "counts": counts or {"kept": 1}, "traces": [{**TRACE, **changes}]}


TRACES = {
    "number": 3,
    "list": [],
    "no traces": {"question": 0, "counts": {}},
    "traces": {"question": 0, "counts": {}, "traces": 3},
    "counts": {"question": 0, "counts": [], "traces": []},
    "unknown count": line(counts={"__class__": 1}),
    "infinite count": line(counts={"kept": float("inf")}),
    "negative count": line(counts={"kept": -1}),
    "text for tokens": line(prompt_ids="ab"),
    "huge token": line(prompt_ids=[2**63]),
    "negative token": line(revision_ids=[-1]),
    "fraction": line(initial_ids=[1.5]),
    "nested": line(verdict_ids=[[1]]),
    "no token": line(prompt_ids=[]),
    "unknown field": line(__init__="x"),
}


@pytest.mark.parametrize("name", TRACES)
def test_traces(name, tmp_path):
    pytest.importorskip("trl")
    from fused_sd.integrations.trl import load_traces

    path = traces_file(tmp_path / "traces.jsonl", TRACES[name])
    with pytest.raises(ValueError, match="path must hold what collect_traces wrote") as caught:
        load_traces(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    "content", [b"", b"\xff\xfe\n", DEEP.encode() + b"\n", b"[]\n", b'{"format": "other"}\n']
)
def test_other_files_are_no_traces(content, tmp_path):
    pytest.importorskip("trl")
    from fused_sd.integrations.trl import load_traces

    (tmp_path / "traces.jsonl").write_bytes(content)
    with pytest.raises(ValueError, match="path must be a file of 'fused_sd traces 1'"):
        load_traces(tmp_path / "traces.jsonl")


def test_traces_with_a_broken_header_or_line(tmp_path):
    pytest.importorskip("trl")
    from fused_sd.integrations.trl import load_traces

    path = traces_file(tmp_path / "traces.jsonl", line(), config=[])
    with pytest.raises(ValueError, match="path must hold"):
        load_traces(path)
    path = traces_file(tmp_path / "traces.jsonl", line())
    assert load_traces(path).traces[0].prompt_ids == (5, 6)
    with path.open("ab") as file:
        file.write(DEEP.encode() + b"\n")
    with pytest.raises(ValueError, match="path must hold"):
        load_traces(path)


class Bomb:
    """What a pickle runs when it is read."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


STATES = {
    "list": [],
    "kind": {"kind": "synced", "age": 0, "weights": {}},
    "no weights": {"kind": "ema", "age": 0},
    "texts": {"kind": "ema", "age": 0, "weights": {"weight": "x"}},
    "age": {"kind": "ema", "age": "x", "weights": {}},
    "negative age": {"kind": "ema", "age": -1, "weights": {}},
    "other names": {"kind": "ema", "age": 0, "weights": {"../weight": torch.ones(2, 2)}},
    "other shape": {"kind": "ema", "age": 0, "weights": {"weight": torch.ones(9, 9)}},
}


@pytest.mark.parametrize("name", STATES)
def test_a_teacher_s_state(name):
    student = nn.Linear(2, 2, bias=False)
    teacher = Teacher(student, kind="ema")
    before = teacher.module.weight.clone()
    with pytest.raises(ValueError, match="must"):
        teacher.load_state_dict(STATES[name])
    assert torch.equal(teacher.module.weight, before)
    assert teacher.age == 0


def test_a_checkpoint_s_pickle_is_not_run(tmp_path):
    pytest.importorskip("trl")
    from fused_sd.integrations.trl.teachers import TEACHER_FILE, load_teacher

    teacher = Teacher(nn.Linear(2, 2, bias=False), kind="ema")
    torch.save({"kind": "ema", "weights": Bomb(tmp_path / "ran")}, tmp_path / TEACHER_FILE)
    with pytest.raises(pickle.UnpicklingError, match="Weights only"):
        load_teacher(teacher, str(tmp_path))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "text", ["3", "[1, 2]", "{}", DEEP, "", '"ab"', '[3, "x", {}]', '[["x"], null, null]']
)
def test_attempts_of_a_discovery(text, tmp_path):
    pytest.importorskip("trl")
    from fused_sd.integrations.trl.discovery import ATTEMPTS_FILE, _read_attempts

    (tmp_path / ATTEMPTS_FILE).write_text(text)
    with pytest.raises(ValueError, match=f"{ATTEMPTS_FILE} must hold the attempts of a run"):
        _read_attempts(tmp_path / ATTEMPTS_FILE)
    (tmp_path / ATTEMPTS_FILE).write_text('[[0.0, 1], 2, "it"]')
    assert _read_attempts(tmp_path / ATTEMPTS_FILE) == ([0.0, 1.0], 2, "it")
