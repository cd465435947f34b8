"""The benchmark of a whole training step: its plan, measurements, search and verdicts."""

import dataclasses
import json
import math

import pytest
import torch

pytest.importorskip("trl")
import trl_pairs  # noqa: F401  # sets TRL's environment before it is imported

from benchmarks.step import __main__ as command
from benchmarks.step import (
    agreement,
    batch,
    loop,
    models,
    plan,
    process,
    report,
    schedule,
    trainers,
)
from benchmarks.step.providers import PROVIDERS
from benchmarks.step.results import Results
from benchmarks.step.search import Bracket, longest
from benchmarks.step.sizes import SIZES

SETTINGS = plan.Settings(
    device="cpu",
    dtype="float32",
    lengths=(40, 64),
    steps=1,
    row_tokens=40,
    longest_cap=0,
    precision=0.1,
    memory_limit=None,
)


@pytest.fixture(autouse=True)
def short_contexts(monkeypatch):
    """Contexts and comparisons that are shorter than the real ones, to save time."""
    monkeypatch.setattr(batch, "PROMPT_TOKENS", 8)
    monkeypatch.setattr(batch, "FEEDBACK_TOKENS", 8)
    monkeypatch.setattr(schedule, "NUM_TOKENS", 32)


def findings(provider, settings=SETTINGS, **changes):
    """The findings of a job that runs in this process."""
    said = []
    job = plan.Job("tiny", provider, settings, settings.lengths, **changes)
    schedule.measure(job, said.append)
    return said


def cells(said):
    return [finding["cell"] for finding in said if "cell" in finding]


@pytest.mark.parametrize(
    "name, parameters",
    [("qwen3-0.6b", 596_049_920), ("qwen3-1.7b", 1_720_574_976), ("qwen3-4b", 4_022_468_096)],
)
def test_the_sizes_are_those_of_the_public_models(name, parameters):
    with torch.device("meta"):
        model = models.Qwen3ForCausalLM(models.configuration(SIZES[name]))
    assert model.num_parameters() == parameters
    size = SIZES[name]
    norms_and_embeddings = parameters - size.backbone_parameters
    assert 0 <= norms_and_embeddings - size.vocab * size.hidden < parameters / 1000


def test_the_random_model_is_alike_in_every_process_and_has_a_policys_logits(monkeypatch):
    monkeypatch.undo()
    first, second = (models.random_model(SIZES["tiny"], "cpu", torch.float32) for _ in range(2))
    for ours, theirs in zip(first.parameters(), second.parameters()):
        assert torch.equal(ours, theirs)
    made = batch.make_batch(64, 64, SIZES["tiny"].vocab, "cpu")
    with torch.no_grad():
        student = first(torch.cat([made["prompt_ids"], made["completion_ids"]], 1)).logits
        teacher = first(made["teacher_input_ids"]).logits
    student, teacher = (z[:, -65:-1].log_softmax(-1) for z in (student, teacher))
    entropy = -(student.exp() * student).sum(-1).mean()
    divergence = (teacher.exp() * (teacher - student)).sum(-1).mean()
    assert 0.5 < float(entropy) < 6
    assert 1e-3 < float(divergence) < 0.3


@pytest.mark.parametrize("num_tokens, rows, length", [(40, 1, 40), (64, 2, 32), (81, 3, 27)])
def test_a_batch_has_equal_rows_and_one_response_in_both_contexts(num_tokens, rows, length):
    made = batch.make_batch(num_tokens, 40, 4099, "cpu")
    assert made["completion_ids"].shape == (rows, length)
    both = torch.cat([made["prompt_ids"], made["completion_ids"]], 1)
    assert torch.equal(made["teacher_input_ids"][:, -both.size(1) :], both)
    ids = made["teacher_input_ids"]
    assert int(ids.min()) >= 2
    assert int(ids.max()) < 4099
    assert len(ids.unique()) > 30


def test_every_provider_agrees_with_float64_and_is_measured_at_every_length():
    losses = {}
    for name, provider in PROVIDERS.items():
        said = findings(name)
        agreement = said[0]["agreement"]
        assert agreement["loss_error"] <= 1e-4, name
        assert agreement["gradient_error"] <= 1e-3, name
        losses.setdefault(provider.objective, []).append(agreement["loss"])
        measured = cells(said)
        assert [cell["outcome"] for cell in measured] == ["measured"] * 2, name
        assert [(cell["tokens"], cell["rows"]) for cell in measured] == [(40, 1), (64, 2)]
        for cell in measured:
            assert cell["seconds"]["p50"] > 0
    assert {objective: len(values) for objective, values in losses.items()} == {
        "topk": 2,
        "full": 3,
        "sampled": 2,
    }
    for values in losses.values():
        assert values == pytest.approx(values[:1] * len(values), rel=1e-4)


def test_the_steps_train_with_checkpointing_and_move_the_weights(monkeypatch):
    seen = {}
    build = trainers.BUILDERS["fused-topk"]

    def watched(setup):
        seen["before"] = setup.model.get_output_embeddings().weight.detach().clone()
        seen["trainer"] = build(setup)
        return seen["trainer"]

    monkeypatch.setitem(schedule.BUILDERS, "fused-topk", watched)
    findings("fused-topk")
    trainer = seen["trainer"]
    assert trainer.state.global_step == 1 + 2 * (1 + SETTINGS.steps)
    assert trainer.model.is_gradient_checkpointing
    assert type(trainer.optimizer.optimizer) is torch.optim.AdamW
    assert not torch.equal(trainer.model.get_output_embeddings().weight, seen["before"])


def test_a_provider_with_another_loss_is_called_wrong_and_is_not_timed(monkeypatch):
    build = trainers.BUILDERS["trl-full"]

    def wrong(setup):
        trainer = build(setup)
        trainer.temperature = 1.01
        return trainer

    monkeypatch.setitem(schedule.BUILDERS, "trl-full", wrong)
    said = findings("trl-full")
    assert list(said[-1]) == ["wrong"]
    assert not cells(said)


def test_running_out_of_memory_ends_the_lengths_and_the_search_goes_on(monkeypatch):
    """The error comes from backward, which leaves gradients and half a graph behind."""
    build, too_long = trainers.BUILDERS["fused-sampled"], 52

    def small_card(setup):
        trainer = build(setup)
        backward = trainer.accelerator.backward

        def guarded(loss, **kwargs):
            backward(loss, **kwargs)
            if trainer._prepare_inputs(None)["completion_ids"].numel() >= too_long:
                raise torch.OutOfMemoryError("CUDA out of memory")

        trainer.accelerator.backward = guarded
        return trainer

    monkeypatch.setitem(schedule.BUILDERS, "fused-sampled", small_card)
    settings = dataclasses.replace(SETTINGS, lengths=(40, 64, 80), longest_cap=100, row_tokens=100)
    said = findings("fused-sampled", settings)
    outcomes = ["measured", "out of memory", "out of memory"]
    assert [cell["outcome"] for cell in cells(said)] == outcomes
    assert cells(said)[2]["reason"] == "64 tokens do not fit"
    assert said[-1] == {"longest": {"fits": 49, "fails": 52, "complete": True}}


def test_another_error_is_not_taken_for_memory(monkeypatch):
    build = trainers.BUILDERS["fused-sampled"]

    def broken(setup):
        trainer = build(setup)
        trainer.accelerator.backward = lambda loss, **_: torch.ones(2) @ torch.ones(3)
        return trainer

    monkeypatch.setitem(schedule.BUILDERS, "fused-sampled", broken)
    with pytest.raises(RuntimeError, match="inconsistent tensor size"):
        findings("fused-sampled")


@pytest.mark.parametrize(
    "limit, peak, ran_out, fits",
    [(None, 90, False, True), (50, 60, False, True), (50, 61, False, False), (50, 60, True, False)],
)
def test_a_step_fits_that_ended_within_the_limit(limit, peak, ran_out, fits):
    settings = dataclasses.replace(SETTINGS, memory_limit=limit)
    job = plan.Job("tiny", "trl-full", settings, ())
    measured = schedule.Schedule(job, print, base=10)
    assert measured.fits(loop.Step(1.0, 20, peak, ran_out)) is fits


def test_a_length_without_time_is_left_for_another_run():
    assert not cells(findings("fused-sampled", seconds=0.0))


def follow(known, threshold, *, cap=1000, precision=0.05, tries=100):
    """Search where every length below the threshold fits."""
    tried = []
    probe = longest(
        known, first=8, cap=cap, precision=precision, may_try=lambda _: len(tried) < tries
    )
    try:
        length = next(probe)
        while True:
            tried.append(length)
            length = probe.send(length < threshold)
    except StopIteration as end:
        return end.value, tried


@pytest.mark.parametrize(
    "known, threshold",
    [
        *((Bracket(0, None, False), threshold) for threshold in (1, 2, 9, 100, 731, 999)),
        *((Bracket(16, None, False), threshold) for threshold in (17, 100, 999)),
        (Bracket(16, 200, False), 100),
    ],
)
def test_the_search_ends_with_a_close_bracket_around_the_threshold(known, threshold):
    found, tried = follow(known, threshold)
    assert found.complete
    assert found.fits < threshold <= found.fails
    assert found.fails - found.fits <= max(1, 0.05 * found.fits)
    assert len(tried) <= 2 * math.log2(1000) + 4
    assert len(tried) == len(set(tried))


def test_the_search_stops_at_the_cap_and_where_time_ends():
    assert follow(Bracket(0, None, False), 10**6)[0] == Bracket(1000, None, True)
    assert follow(Bracket(0, None, False), 100, tries=3)[0] == Bracket(32, None, False)
    assert follow(Bracket(90, 100, False), 95, tries=0) == (Bracket(90, 100, False), [])
    assert follow(Bracket(98, 100, False), 99) == (Bracket(98, 100, True), [])


def test_the_plan_keeps_what_is_known_and_puts_the_important_pair_first():
    searched = dataclasses.replace(SETTINGS, longest_cap=128)
    known = {
        "tiny/trl-topk": {
            "cells": {"40": {"tokens": 40, "outcome": "measured"}},
        },
        "tiny/fused-topk": {"cells": {}, "wrong": "it is"},
        "small/fused-topk": {
            "cells": {
                "40": {"tokens": 40, "outcome": "measured"},
                "64": {"tokens": 64, "outcome": "out of memory"},
            },
            "longest": {"fits": 40, "fails": 64, "complete": False},
        },
    }
    planned = plan.jobs(["tiny", "small"], ["trl-topk", "fused-topk"], searched, known)
    named = [(job.model, job.provider, job.lengths, job.fits, job.fails) for job in planned]
    assert named == [
        ("tiny", "trl-topk", (64,), 40, None),
        ("small", "trl-topk", (40, 64), 0, None),
        ("small", "fused-topk", (), 40, 64),
    ]
    known["small/fused-topk"]["longest"]["complete"] = True
    assert len(plan.jobs(["tiny", "small"], ["trl-topk", "fused-topk"], searched, known)) == 2
    everything = plan.jobs(["tiny", "small"], list(PROVIDERS), SETTINGS, {})
    assert [job.name for job in everything[:5]] == [
        *("tiny/trl-topk", "tiny/fused-topk", "small/trl-topk", "small/fused-topk"),
        "tiny/trl-full",
    ]
    assert len({job.name for job in everything}) == 2 * len(PROVIDERS)
    assert plan.Job.from_json(planned[2].to_json()) == planned[2]


def test_estimates_grow_with_tokens_and_contain_every_step():
    size = SIZES["qwen3-4b"]
    seconds = [plan.step_seconds(size, n, SETTINGS) for n in (4096, 16384, 65536)]
    assert seconds == sorted(seconds)
    job = plan.Job("qwen3-4b", "trl-topk", SETTINGS, SETTINGS.lengths)
    steps = sum(plan.step_seconds(size, n, SETTINGS) for n in SETTINGS.lengths)
    assert plan.job_seconds(job) == pytest.approx(
        plan.STARTUP_SECONDS["cpu"] + (1 + SETTINGS.steps) * steps
    )
    assert plan.least_seconds(job) < plan.job_seconds(job)


def test_the_command_measures_in_a_process_writes_and_resumes(tmp_path, capsys):
    arguments = [
        *("--models", "tiny", "--providers", "fused-topk", "--lengths", "40", "--steps", "1"),
        *("--device", "cpu", "--out", str(tmp_path), "--row-tokens", "40"),
    ]
    assert command.main(arguments) == command.DONE
    document = json.loads((tmp_path / "step.json").read_text())
    lane = document["lanes"]["tiny/fused-topk"]
    cell = lane["cells"]["40"]
    assert cell["outcome"] == "measured"
    assert cell["peak_bytes"] >= cell["held_bytes"] > 2**20  # three times 0.3 million parameters
    assert lane["agreement"]["loss_error"] <= 1e-4
    assert {"torch", "trl", "commit"} <= document["environment"].keys()
    assert "| fused_sd, top-100 + tail | " in capsys.readouterr().out
    assert command.main([*arguments, "--resume"]) == command.DONE
    assert capsys.readouterr().out.startswith("0 processes")
    for changed, kind in (("--steps", "settings"), ("--commit", "environment")):
        assert command.main([*arguments, "--resume", changed, "2"]) == command.MISUSED
        message = f"find results of the same {kind} in {tmp_path}"
        assert message in capsys.readouterr().err


def test_a_process_that_fails_and_one_without_budget_are_reported(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(process.sys, "executable", "/bin/false")
    monkeypatch.setattr(command, "RESULTS", tmp_path)  # without --out, one folder for each device
    arguments = ["--models", "tiny", "--device", "cpu"]
    assert command.main([*arguments, "--providers", "fused-topk"]) == command.UNFINISHED
    (path,) = tmp_path.glob("cpu-*/step.json")
    lane = json.loads(path.read_text())["lanes"]["tiny/fused-topk"]
    assert lane["failed"] == "exit status 1: nothing was said"
    command.main([*arguments, "--providers", "trl-topk", "--budget-seconds", "1"])
    lane = json.loads(path.read_text())["lanes"]["tiny/trl-topk"]
    assert lane["left_out"] == "the time was up"
    assert "(left out: the time was up)" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--models", "gpt-2"], "must be of qwen3-0.6b"),
        (["--providers", "stock"], "must be of trl-topk"),
        (["--lengths", "0,8"], "must be positive"),
        (["--steps", "0"], "at least 1"),
        (["--longest-cap", "64"], "--memory-limit"),
    ],
)
def test_arguments_that_mean_nothing_are_refused(arguments, message, tmp_path, capsys):
    with pytest.raises(SystemExit):
        command.parse(["--device", "cpu", "--out", str(tmp_path), *arguments])
    assert message in capsys.readouterr().err


def lane(seconds, longest):
    measured = {
        str(length): {
            "tokens": length,
            "outcome": "measured",
            "seconds": {"p20": value, "p50": value, "p80": value},
            "peak_bytes": 2**30,
        }
        for length, value in seconds.items()
    }
    return {"cells": measured, "longest": dict(zip(("fits", "fails", "complete"), longest))}


@pytest.mark.parametrize(
    "theirs, ours, said",
    [
        (({40: 2.0}, (50, 52, True)), ({40: 1.0}, (104, None, True)), "at any length: met"),
        (({40: 2.0}, (50, 52, True)), ({40: 1.0}, (104, None, True)), "tokens: met (at least 2.0"),
        (({40: 2.0}, (50, 52, True)), ({40: 2.5}, (90, 92, True)), "MISSED at 40 (speed 0.80 x"),
        (({40: 2.0}, (50, 52, True)), ({40: 2.5}, (90, 92, True)), "MISSED (1.7 to 1.8 x)"),
        (({40: 2.0}, (50, 52, True)), ({40: 1.0}, (99, 110, True)), "not decided (1.9 to 2.2 x)"),
        (({40: 2.0}, (50, None, True)), ({40: 1.0}, (50, None, True)), "TRL's still fits at 50"),
        (({40: 2.0}, (50, 52, True)), ({40: 1.0}, (60, None, True)), "ours still fits"),
        (({40: 2.0}, (0, 40, True)), ({64: 1.0}, (60, None, True)), "at any length: not measured"),
        (({40: 2.0}, (0, 40, True)), ({64: 1.0}, (60, None, True)), "the tokens: not measured"),
    ],
)
def test_verdicts_say_what_is_certain(theirs, ours, said):
    lanes = {"tiny/trl-topk": lane(*theirs), "tiny/fused-topk": lane(*ours)}
    (verdict,) = report.verdicts({"lanes": lanes})
    assert said in verdict


def test_the_full_divergence_is_judged_against_both_of_trls_trainers(tmp_path):
    results = Results(tmp_path, SETTINGS, resume=False)
    for name in ("trl-full", "trl-distillation", "fused-full", "fused-sampled"):
        results.add(f"tiny/{name}", {"cell": {"tokens": 40, "outcome": "out of memory"}})
    lines = report.verdicts(results.values)
    assert len(lines) == 2
    assert all(line.startswith("tiny, fused_sd, full against TRL ") for line in lines)
    assert report.markdown(results.values).count("| out of memory | not run |") == 4


@pytest.mark.parametrize("bounds", agreement.BOUNDS.values(), ids=agreement.BOUNDS)
def test_a_step_without_a_gradient_never_agrees(bounds):
    """A missing gradient has an error of exactly 1."""
    found = agreement.Agreement(1.0, 1.0, 0.0, 1.0, bounds)
    assert not found.agrees
    assert found._replace(gradient_error=0.9 * bounds[1]).agrees
    assert not found._replace(gradient_error=float("nan")).agrees
