"""One of two processes dies or stands still: the other ends and says why, and nothing is lost."""

import os
import re

import pytest
import torch

pytest.importorskip("trl")

import killed_runs
from killed_runs import assert_same_bits, start
from ranks import free_port

NAME, BOTH = "SDPO, EMA", range(2)
TIMEOUT = 20  # seconds for a collective
PATIENCE = 60  # seconds for the rest, on a machine that does other work
# by fault of the second process: what the first one's error says
ENDS = {
    "killed in a step": r"Connection (closed|reset) by peer",
    "stopped in a step": r"Timed out waiting \d+ms for",
}


def pair(folder, **more):
    port = free_port()
    given = {"per_device_train_batch_size": 2, **more}
    return [start(killed_runs.run_rank, folder, n, port, TIMEOUT, NAME, **given) for n in BOTH]


def remains_of_pair(folder, **more):
    for process in pair(folder, **more):
        process.join(300)
        assert process.exitcode == 0
    return [torch.load(folder / f"remains{n}.pt", weights_only=False) for n in BOTH]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return remains_of_pair(tmp_path_factory.mktemp("whole"))


@pytest.mark.parametrize("fault", ENDS)
def test_the_other_process_ends_and_both_go_on_later(fault, whole, tmp_path):
    if fault != "killed in a step" and not os.environ.get("FUSED_SD_TEST_FULL"):
        pytest.skip("it waits for a time limit: make test-full")
    other, faulty = pair(tmp_path, fault=fault)
    try:
        other.join(TIMEOUT + PATIENCE)
        assert other.exitcode == 1, "it ends by itself"
    finally:
        other.kill()
        faulty.kill()
        faulty.join()
    assert re.search(ENDS[fault], (tmp_path / "error0").read_text())
    for found, wanted in zip(remains_of_pair(tmp_path, resume=True), whole, strict=True):
        assert_same_bits(found, wanted)
