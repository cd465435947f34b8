"""Dense against sparse training: the statistics, both experiments on a tiny model, the report."""

import json
import os
from dataclasses import replace

import pytest
import torch

for _name in ("trl", "peft", "datasets"):
    pytest.importorskip(_name)

from tiny_models import tiny_model
from trl_pairs import TOKENIZER, VOCAB

from benchmarks.sparse import online, replay
from benchmarks.sparse.__main__ import main, parse
from benchmarks.sparse.arms import DENSE, SPARSE
from benchmarks.sparse.comparison import certificates, compare_curves, compare_replay
from fused_sd.demo import model as demo_model

STEPS = 2
SCALE = replay.Scale(steps=STEPS, words=2, held_out=2, num_examples=1, learning_rate=1e-3)


@pytest.fixture
def tiny(monkeypatch, tmp_path):
    """Replace the demo's model by a tiny one with the tokenizer's end token."""
    monkeypatch.setattr(os, "environ", dict(os.environ))
    model = tiny_model(vocab=VOCAB, max_position_embeddings=512)
    model.generation_config.eos_token_id = [TOKENIZER.eos_token_id]
    model.save_pretrained(tmp_path / "model")

    def load(directory, device):
        made = type(model).from_pretrained(directory)
        made.generation_config.eos_token_id = [TOKENIZER.eos_token_id]
        return made, TOKENIZER

    monkeypatch.setattr(demo_model, "load", load)
    monkeypatch.setattr(demo_model, "model_directory", lambda: tmp_path / "model")
    small = replace(online.SETTINGS, prompts_per_step=1, num_examples=1, max_answer_length=2)
    monkeypatch.setattr(online, "SETTINGS", small)
    monkeypatch.setattr(replay, "Scale", lambda steps: replace(SCALE, steps=steps))
    return model


def test_a_look_is_compared_with_the_dense_seeds_spread():
    dense = [[(0, 1.0), (5, 2.0)], [(0, 3.0), (5, 2.0)]]
    other = [[(0, 2.0), (5, 2.5)], [(0, 5.0), (5, 3.0)]]
    first, second = compare_curves(dense, other)
    assert first["difference"] == 1.5
    assert first["spread"] == pytest.approx(2**0.5)
    assert first["paired_spread"] == pytest.approx(0.5**0.5)
    assert first["distance"] == pytest.approx(1.5 / 2**0.5)
    assert second["distance"] == 0  # no spread, no unit


def test_certificates_are_weighted_by_their_tokens():
    steps = [
        {"tokens": 4.0, "dense": 4.0, "entries": 0.0, "dropped": 0.0},
        {"tokens": 4.0, "dense": 2.0, "entries": 10.0, "dropped": 0.002},
    ]
    said = certificates([{"steps": steps}])
    assert said["dense_share"] == 0.75
    assert said["entries"] == 10
    assert said["largest_dropped"] == 0.002


def test_replay_changes_nothing_but_the_gradient(tiny):
    model, tokenizer = tiny, TOKENIZER
    before = [parameter.detach().clone() for parameter in model.parameters()]
    found = replay.run(model, tokenizer, 0, SCALE)["arms"]
    assert list(found) == [DENSE.name, SPARSE.name, replay.OTHER]
    assert all(torch.equal(*pair) for pair in zip(before, model.parameters()))
    assert found[DENSE.name]["distance"] == 0
    assert found[DENSE.name]["KL from dense"] == pytest.approx(0, abs=1e-7)
    assert found["2^-8"]["steps"][0]["loss"] == found[DENSE.name]["steps"][0]["loss"]
    assert 0 < max(step["dropped"] for step in found["2^-8"]["steps"]) <= SPARSE.tolerance
    compared = compare_replay([{"arms": found}])
    assert 0 < compared["2^-8"]["KL from dense"] < compared[replay.OTHER]["KL from dense"]
    assert compared["2^-8"]["loss gap"] < 0.01


def test_the_command_runs_resumes_and_reports(tiny, tmp_path, capsys):
    where = ["--work", f"{tmp_path}/work", "--results", f"{tmp_path}/results"]
    arguments = ["--seeds", "0,1", "--steps", f"{STEPS}", "--device", "cpu", *where]
    main(arguments)
    found = json.loads((tmp_path / "results" / "online.json").read_text())
    assert found["seeds"] == [0, 1]
    compared = found["compared"]["2^-8"]
    assert [look["step"] for look in compared["curves"]["held-out KL"]] == [0, STEPS]
    assert 0 < compared["certificates"]["largest_dropped"] <= 2**-8
    runs = [json.loads(path.read_text()) for path in (tmp_path / "work").glob("online-*.json")]
    assert len(runs) == 4
    assert all(len(run["values"]["steps"]) == STEPS for run in runs)
    page = (tmp_path / "results" / "report.md").read_text()
    assert "| 2^-8 | accuracy | 0 |" in page
    assert "| dense, other draw |" in page

    capsys.readouterr()
    main([*arguments, "--resume"])
    assert "online-" not in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments, message",
    [(["--seeds", "3"], "--seeds must be two or more"), (["--steps", "1"], "at least 2, got 1")],
)
def test_too_little_is_refused(arguments, message, capsys):
    with pytest.raises(SystemExit):
        parse(arguments)
    assert message in capsys.readouterr().err
