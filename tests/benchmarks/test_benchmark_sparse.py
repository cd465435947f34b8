"""Dense against sparse training: the statistics, both experiments on a tiny model, the report."""

import json
import os
from dataclasses import replace

import pytest
import torch

for _name in ("trl", "peft", "datasets", "matplotlib"):
    pytest.importorskip(_name)

from tiny_models import tiny_model
from trl_pairs import TOKENIZER, VOCAB

from benchmarks.sparse import online, replay
from benchmarks.sparse.__main__ import main, parse
from benchmarks.sparse.arms import ARMS, DENSE
from benchmarks.sparse.comparison import certificates, compare_curves, compare_replay
from fused_sd.demo import model as demo_model

STEPS = 2
SCALE = replay.Scale(steps=STEPS, words=2, held_out=2, num_examples=1, learning_rate=1e-3)


@pytest.fixture
def tiny(monkeypatch, tmp_path):
    """The demo's model is a tiny one, whose end is the end of its tokenizer."""
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
    found = replay.run(model, tokenizer, list(ARMS.values()), 0, SCALE)["arms"]
    assert list(found) == [DENSE.name, "2^-8", "2^-6", replay.OTHER]
    assert all(torch.equal(*pair) for pair in zip(before, model.parameters()))
    assert found[DENSE.name]["distance"] == 0
    assert found[DENSE.name]["KL from dense"] == pytest.approx(0, abs=1e-7)
    assert found["2^-8"]["steps"][0]["loss"] == found[DENSE.name]["steps"][0]["loss"]
    for name in ("2^-8", "2^-6"):
        shares = [step["dropped"] for step in found[name]["steps"]]
        assert 0 < max(shares) <= ARMS[name].tolerance
    compared = compare_replay([{"arms": found}])
    assert 0 < compared["2^-8"]["KL from dense"] < compared[replay.OTHER]["KL from dense"]
    assert compared["2^-8"]["loss gap"] < 0.01


def test_the_command_runs_resumes_and_reports(tiny, tmp_path, capsys):
    where = ["--work", f"{tmp_path}/work", "--results", f"{tmp_path}/results"]
    main(["--seeds", "0,1", "--steps", f"{STEPS}", "--arms", "2^-8", "--device", "cpu", *where])
    found = json.loads((tmp_path / "results" / "online.json").read_text())
    assert found["seeds"] == [0, 1]
    for run in found["runs"]["2^-8"]:
        assert len(run["steps"]) == STEPS
        assert [step for step, _ in run["curves"]["held-out KL"]] == [0, STEPS]
        assert all(step["dropped"] <= 2**-8 for step in run["steps"])
    assert "dropped" not in found["runs"]["dense"][0]["steps"][0]
    page = (tmp_path / "results" / "report.md").read_text()
    assert "| 2^-8 | accuracy | 0 |" in page
    assert "| dense, other draw |" in page
    assert (tmp_path / "results" / "curves.png").stat().st_size > 0

    capsys.readouterr()
    again = ["--seeds", "0,1", "--steps", f"{STEPS}", "--arms", "2^-8", "--device", "cpu"]
    main([*again, "--resume", *where])
    assert "online-" not in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments, message",
    [(["--seeds", "3"], "--seeds must be two or more"), (["--steps", "1"], "at least 2, got 1")],
)
def test_too_little_is_refused(arguments, message, capsys):
    with pytest.raises(SystemExit):
        parse(arguments)
    assert message in capsys.readouterr().err


def test_an_unknown_arm_is_named():
    with pytest.raises(SystemExit, match=r"--arms must name some of dense, 2\^-8"):
        main(["--arms", "none"])
