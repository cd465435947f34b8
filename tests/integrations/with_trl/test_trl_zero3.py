"""Trainers under DeepSpeed's ZeRO-3 in two processes do what one process does without it."""

import dataclasses
import importlib.util

import pytest
import torch
from method_pairs import model, weights

# a look at the package: importing it warns, and would start its logging here
if not importlib.util.find_spec("deepspeed"):
    pytest.skip("deepspeed is not installed", allow_module_level=True)

import zero3_worker
from ranks import remains_of
from trl_worker import train
from zero3_worker import RUNS

NAMES = tuple(RUNS)
WHOLE = [name for name in NAMES if RUNS[name].broken is None]
RESUMED = [name for name in NAMES if RUNS[name].resumed]


@pytest.fixture(scope="module")
def remains(tmp_path_factory):
    """What each process had at the end of each run."""
    folder = tmp_path_factory.mktemp("processes")
    model(torch.float32).save_pretrained(folder / "model")
    return remains_of(zero3_worker.main, folder, NAMES)


@pytest.fixture
def both(remains, request):
    """The two processes' remains of the run that the test is for."""
    found = remains[request.param]
    for one in found:
        assert "error" not in one, one["error"]
    return found


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """What one process makes of a run without DeepSpeed."""
    known = {}

    def find(run):
        run = dataclasses.replace(run, resumed=False, from_path=False)
        key = repr(run)
        if key not in known:
            known[key] = train(run, tmp_path_factory.mktemp("alone"), 1)
        return known[key]

    return find


def each(names):
    return pytest.mark.parametrize("both, name", [(n, n) for n in names], indirect=["both"])


def assert_near(found, expected):
    """Equal up to float32's rounding in sums of other orders."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=2e-6, msg=name)


@each([name for name in WHOLE if name not in RESUMED])
def test_weights_and_teachers_are_those_of_one_process(both, name, alone):
    expected = alone(RUNS[name])
    start = weights()
    for found in both:
        assert_near(found["weights"], expected["weights"])
        assert_near(found["teacher"], expected["teacher"])
        assert found["age"] == expected["age"]
        assert found["skipped"] == 0
        if not RUNS[name].adapter:
            moved = [(w - start[name]).abs().max() for name, w in found["weights"].items()]
            assert min(moved) > 1e-3


@each([name for name in NAMES if RUNS[name].broken is not None])
def test_a_gradient_that_is_broken_in_one_process_moves_neither_side(both, name):
    start = weights()
    for found in both:
        assert found["skipped"] == 1
        assert found["age"] == 0
        for part in ("weights", "teacher"):
            for parameter in found[part].keys() & start.keys():
                assert torch.equal(found[part][parameter], start[parameter]), (part, parameter)


@each(RESUMED)
def test_a_resumed_run_goes_on_with_weights_and_teacher_of_the_first(both, name):
    for found in both:
        for part in ("weights", "teacher"):
            assert_near(found["resumed"][part], found[part])
