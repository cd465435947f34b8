"""FusedGKDTrainer in two processes, replicated or sharded, does what TRL's trainer does there."""

import gkd_worker
import pytest
import torch
from gkd_pairs import build
from gkd_worker import RUNS
from ranks import free_port, spawn

NAMES = tuple(RUNS)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where each process saved what it had at the end of each run."""
    made = tmp_path_factory.mktemp("processes")
    spawn(gkd_worker.main, free_port(), str(made))
    return made


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("name", NAMES)
def test_a_step_is_trls(name, rank, folder):
    stock, fused = (
        torch.load(folder / f"{NAMES.index(name)}-{cls}-{rank}.pt", weights_only=False)
        for cls in ("GKDTrainer", "FusedGKDTrainer")
    )
    for found in (stock, fused):
        assert "error" not in found, found["error"]
    assert fused["logged"] == pytest.approx(stock["logged"], rel=1e-6)
    assert fused["weights"].keys() == stock["weights"].keys()
    if "LoRA" not in name:
        before = build(0, dtype=torch.float64).state_dict()
        assert any(not torch.equal(weight, before[n]) for n, weight in stock["weights"].items())
    for parameter, expected in stock["weights"].items():
        torch.testing.assert_close(
            fused["weights"][parameter], expected, rtol=1e-8, atol=1e-9, msg=parameter
        )
