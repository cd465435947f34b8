"""Trainers in two processes, replicated or sharded, do what one process does with the same rows."""

import dataclasses
import pathlib

import pytest
import torch
import trl_worker
from method_pairs import weights
from ranks import remains_of
from trl_worker import RUNS, rewards, train

NAMES = tuple(RUNS)
BROKEN = [name for name in NAMES if RUNS[name].broken is not None]
FIRST = [name for name in NAMES if RUNS[name].fsdp == 1]
WHOLE = [name for name in NAMES if name not in BROKEN + FIRST and not RUNS[name].resumed]
# a mean over micro-batches is another one where these are others
MICRO = ("loss_type", "gradient_accumulation_steps")
ONE_BATCH = [n for n in WHOLE if not any(name in RUNS[n].settings for name in MICRO)]
RESUMED = [name for name in NAMES if RUNS[name].resumed]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("processes")


@pytest.fixture(scope="module")
def remains(folder):
    """What each process had at the end of each run."""
    return remains_of(trl_worker.main, folder, NAMES)


@pytest.fixture
def both(remains, request):
    """The two processes' remains of the run that the test is for."""
    found = remains[request.param]
    for one in found:
        assert "error" not in one, one["error"]
    return found


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """What one process makes of a run; the same for replicated and sharded ones."""
    known = {}

    def find(run):
        run = dataclasses.replace(run, fsdp=0, resumed=False)
        key = repr(run)
        if key not in known:
            known[key] = train(run, tmp_path_factory.mktemp("alone"), 1)
        return known[key]

    return find


def assert_equal(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-8, atol=1e-10, msg=name)


def each(names):
    return pytest.mark.parametrize("both, name", [(n, n) for n in names], indirect=["both"])


@each(WHOLE)
def test_weights_and_teachers_are_those_of_one_process(both, name, alone):
    expected = alone(RUNS[name])
    for found in both:
        assert_equal(found["weights"], expected["weights"])
        assert_equal(found["teacher"], expected["teacher"])
        assert found["age"] == expected["age"]
        assert found["skipped"] == 0
    start = {n: w.double() for n, w in weights().items()}
    moved = [not torch.equal(start[n], w) for n, w in expected["weights"].items() if n in start]
    assert any(moved) == (any(RUNS[name].success) and not RUNS[name].adapter)


@each(ONE_BATCH)
def test_contexts_and_advantages_come_from_whole_groups(both, name, alone):
    expected = alone(RUNS[name])
    assert both[0]["contexts"] + both[1]["contexts"] == expected["contexts"]
    for part in ("advantages", "signal"):
        assert torch.equal(torch.cat([found[part] for found in both]), expected[part])


@each(ONE_BATCH)
def test_logs_are_those_of_one_process(both, name, alone):
    run = RUNS[name]
    expected = alone(run)["logs"]
    assert len(both[0]["logs"]) == len(expected) == run.steps
    for found, entry in zip(both[0]["logs"], expected):
        assert found == pytest.approx(entry, rel=1e-4, abs=1e-6, nan_ok=False)


@each(BROKEN)
def test_a_gradient_that_is_broken_in_one_process_is_left_out_in_both(both, name):
    start = weights()
    for found in both:
        assert found["skipped"] == 1
        assert found["age"] == 0
        for part in ("weights", "teacher"):
            for parameter in found[part].keys() & start.keys():
                now, before = found[part][parameter], start[parameter].double()
                assert torch.equal(now, before), (part, parameter)


@each(RESUMED)
def test_a_resumed_run_goes_on_with_weights_and_teacher_of_the_first(both, name):
    for found in both:
        assert_equal(found["resumed"]["weights"], found["weights"])
        assert_equal(found["resumed"]["teacher"], found["teacher"])
    assert_equal(both[1]["teacher"], both[0]["teacher"])


@each(["SDPO, credit maps"])
def test_a_credit_map_is_written_once(both, name, folder):
    written = pathlib.Path(folder, f"run{NAMES.index(name)}", "credit_maps")
    assert sorted(path.name for path in written.iterdir()) == [
        f"step_{step:06d}.{ending}" for step in range(2) for ending in ("html", "json")
    ]


@each(["SDPO, live, FSDP1"])
def test_a_live_teacher_runs_inside_fsdp1(both, name, alone):
    expected = alone(RUNS[name])["logs"]
    assert len(both[0]["logs"]) == len(expected) == 2
    for found, entry in zip(both[0]["logs"], expected):
        assert found == pytest.approx(entry, rel=1e-4, abs=1e-5)


def test_a_teacher_with_weights_of_its_own_is_refused_under_fsdp1(remains):
    for one in remains["SDPO, FSDP1"]:
        assert 'fsdp_config must have version 2 for teacher_model_kind="ema"' in one["error"]


def test_the_scripted_rewards_are_what_the_script_says():
    rows = [trl_worker.completion(row, row % 2) for row in range(4)]
    assert rewards(rows) == [0.0, 1.0, 0.0, 1.0]
