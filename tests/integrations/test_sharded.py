"""Two processes: gradients of a wrapped model are those of one process."""

import importlib.util

import pytest

pytest.importorskip("transformers")
pytest.importorskip("peft")

import sharded_worker
from ranks import free_port, spawn


@pytest.fixture(scope="module")
def worst(tmp_path_factory):
    """The largest difference on either rank, for each layout."""
    folder = tmp_path_factory.mktemp("ranks")
    layouts = tuple(sharded_worker.LAYOUTS)
    spawn(sharded_worker.main, str(folder), layouts)
    found = {}
    for rank in range(2):
        lines = (folder / f"worst{rank}").read_text().splitlines()
        assert len(lines) == len(layouts)
        for name, value in (line.rsplit("=", 1) for line in lines):
            found[name] = max(found.get(name, 0.0), float(value))
    return found


@pytest.mark.parametrize("name", sharded_worker.LAYOUTS)
def test_gradients_are_those_of_one_process(worst, name):
    assert worst[name] < sharded_worker.LAYOUTS[name].tolerance


# a look at the package: importing it warns, and would start its logging here
@pytest.mark.skipif(not importlib.util.find_spec("deepspeed"), reason="deepspeed is not installed")
@pytest.mark.parametrize("loss", ["mixed", "sparse"])
def test_gradients_under_zero3_are_those_of_one_process(loss, tmp_path):
    spawn(sharded_worker.zero3, str(tmp_path), free_port(), loss)
    for rank in range(2):
        assert float((tmp_path / f"zero{rank}").read_text()) < 2e-6
