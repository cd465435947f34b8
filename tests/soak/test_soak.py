"""The short form of ``soak.py``, and that it would see what grows."""

import os

import pytest
import torch

pytest.importorskip("trl")
if not os.path.isdir("/proc/self/fd"):
    pytest.skip("no /proc here", allow_module_level=True)

from footprint import Course, caches, footprint, only_new_objects, slope
from soak import findings
from workloads import Draw, call_losses, calls

import fused_sd.settings

LONG = bool(os.environ.get("FUSED_SD_TEST_FULL"))
NOISE = 20.0  # MiB by 1000: of a short course


def test_calls_of_losses_leave_nothing():
    count = 20_000 if LONG else 600
    course = call_losses(count, count // 3, count // 15)
    assert not findings(course, NOISE)


def test_steps_of_a_trainer_leave_nothing(tmp_path):
    from training import train

    count = 500 if LONG else 24
    assert not findings(train(tmp_path, count, count // 3, count // 12), 4 * NOISE)


def test_every_loss_is_called_and_none_keeps_its_inputs():
    """Each alone, so that a finding has a name."""
    drawn, functions = Draw(0), calls()
    with only_new_objects():
        assert_none_is_kept(drawn, functions)


def assert_none_is_kept(drawn, functions):
    for name, function in functions.items():
        counts = []
        for _ in range(3):
            drawn.new()
            function(drawn).loss.backward()
            drawn.forget()
            found = footprint()
            counts.append((found.tensors, found.objects))
        assert counts[1] == counts[2], name


def test_caches_are_found():
    found, bounded = caches()
    assert "fused_sd.head.vocab_shard._EVEN" in found
    assert "fused_sd.settings._parse" in bounded


@pytest.mark.parametrize("what", ["tensors", "objects", "files", "caches"])
def test_what_grows_is_found(what, monkeypatch):
    kept = []
    grow = {
        "tensors": lambda: torch.ones(1),
        "objects": lambda: fused_sd.LMHead(torch.ones(2, 2)),
        "files": lambda: open(os.devnull),  # noqa: SIM115
        "caches": lambda: fused_sd.settings._KINDS.setdefault(f"kind {len(kept)}", None),
    }[what]
    monkeypatch.setattr(fused_sd.settings, "_KINDS", dict(fused_sd.settings._KINDS))
    prints = []
    with only_new_objects():
        for _ in range(6):
            kept.append(grow())
            prints.append(footprint())
    found = Course("x", list(range(6)), prints).grown()
    name = {"objects": "fused_sd.head.lm_head.LMHead", "caches": "fused_sd.settings._KINDS"}
    assert name.get(what, what) in found
    if what == "files":
        for file in kept:
            file.close()


def test_memory_that_rises_is_found():
    exact = slope([0, 1, 2, 3], [5, 7, 9, 11])
    assert (exact.value, exact.half_width) == (2.0, 0.0)
    noisy = slope([0, 1, 2, 3, 4, 5], [5, 4, 6, 5, 4, 6])
    assert noisy.low < 0 < noisy.half_width
    kept, prints = [], []
    with only_new_objects():
        for _ in range(8):
            kept.append(torch.ones(2**20))
            prints.append(footprint())
    course = Course("x", [1000 * n for n in range(8)], prints)
    assert 3.5 < course.growth.value < 4.5
    assert any(found.startswith("memory rises") for found in findings(course))
