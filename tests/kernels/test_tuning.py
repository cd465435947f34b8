"""The table of block sizes: it is read, has a default for what it lacks, and tune.py writes it."""

import json
import os
import pathlib
import subprocess
import sys

import pytest
import torch

pytest.importorskip("triton")
import fused_sd
from benchmarks import tune
from fused_sd.engine.layout import workspace_width
from fused_sd.kernels import rows, selection, tuning
from fused_sd.kernels.tuning import DEFAULT, Launch

CPU = torch.device("cpu")
ROOT = pathlib.Path(__file__).parents[2]
PROGRAMS = {"log_normalizer", "normalizers", "divergence", "divergence_gradient"}
PROGRAMS |= {"softmax_gradient", "row_metrics", "block_maxima", "block_statistics"}
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in.*:RuntimeWarning")


@pytest.fixture
def table(tmp_path, monkeypatch):
    path = tmp_path / "tuned.json"
    path.write_text("{}")
    for module in (tuning, tune):
        monkeypatch.setattr(module, "TABLE", path)
    tuning.tuned.cache_clear()
    yield path
    tuning.tuned.cache_clear()


def test_the_committed_table_can_be_read():
    table = json.loads(tuning.TABLE.read_text())
    for family, entry in table.items():
        assert set(entry["launches"]) <= PROGRAMS, family
        assert entry["measured_on"]["gpu"]
        for block, warps in entry["launches"].values():
            assert block & (block - 1) == 0
            assert warps in (1, 2, 4, 8, 16, 32)


def test_a_program_is_launched_as_the_table_says(table):
    assert tuning.launch_for("divergence", CPU) == DEFAULT
    table.write_text(json.dumps({"cpu": {"launches": {"divergence": [512, 4]}}}))
    tuning.tuned.cache_clear()
    assert tuning.launch_for("divergence", CPU) == Launch(512, 4)
    assert tuning.launch_for("row_metrics", CPU) == DEFAULT
    with tuning.forced("divergence", Launch(1024, 16)):
        assert tuning.launch_for("divergence", CPU) == Launch(1024, 16)
    assert tuning.launch_for("divergence", CPU) == Launch(512, 4)


@pytest.mark.skipif(torch.cuda.is_available(), reason="interpreted without a GPU")
def test_the_fastest_candidate_of_every_program_is_written(table, monkeypatch):
    candidates = [Launch(256, 4), Launch(512, 4)]
    used = []

    def timer(run):
        """Pretend that blocks of 512 columns are fastest, by the blocks that were launched."""
        before = len(used)
        run()
        blocks = {block for block in used[before:] if block is not None}
        return {512: 1.0, 256: 2.0}.get(blocks.pop() if blocks else None, 3.0)

    launched = tuning.launch_for

    def launch_for(program, device):
        launch = launched(program, device)
        used.append(launch.block_v)
        return launch

    for module in (rows, selection):
        monkeypatch.setattr(module, "launch_for", launch_for)
    results = tune.tune(CPU, timer, num_rows=2, vocabularies=(1000, 700), candidates=candidates)
    assert set(results) == PROGRAMS
    assert all(result.launch == Launch(512, 4) for result in results.values())
    assert all(result.seconds < result.default_seconds for result in results.values())
    tune.write(results, "cpu", {"gpu": "none"}, table)
    tuning.tuned.cache_clear()
    assert tuning.launch_for("divergence", CPU) == Launch(512, 4)


def test_the_measured_rows_are_those_of_a_run(monkeypatch):
    """Rows of any vocabulary are padded, so that they are read 16 bytes at a time."""
    vocab, seen, launch = 1001, {}, tuning.launch

    def row_of(value):
        is_rows = isinstance(value, torch.Tensor) and value.dim() == 2
        return (value.shape[1], value.stride()) if is_rows else None

    def launched(program, num_programs, data, /, **arguments):
        seen[program.__name__] = {name: row_of(value) for name, value in arguments.items()}
        seen[program.__name__]["num_columns"] = arguments.get("num_columns")
        launch(program, num_programs, data, **arguments)

    for module in (rows, selection):
        monkeypatch.setattr(module, "launch", launched)
    for task in tune.make_tasks(4, vocab, CPU):
        task.run()
    measured = dict(seen)
    assert measured["normalizers"]["num_columns"] == workspace_width(vocab)
    seen.clear()
    hidden, weight = torch.randn(4, 16).bfloat16(), torch.randn(vocab, 16).bfloat16()
    sides = hidden.requires_grad_(), weight.requires_grad_(), hidden.detach(), weight.detach()
    for divergence in ("reverse_kl", fused_sd.Jsd(0.5)):
        fused_sd.divergence_loss(
            *sides, divergence=divergence, backend="triton", reduction="sum"
        ).loss.backward()
    support = {"support": fused_sd.StudentTopK(3), "metrics": ("forward_kl",), "reduction": "sum"}
    fused_sd.divergence_loss(*sides, backend="triton", **support)  # its metrics have a pass
    names = {"normalizers", "divergence", "divergence_gradient", "row_metrics"}
    assert {name: seen[name] for name in names} == {name: measured[name] for name in names}


def test_without_a_gpu_nothing_is_measured(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert tune.main([]) == 2
    assert "needs a GPU" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU's launches are timed")
def test_a_dry_run_compiles_and_writes_a_table_of_its_own(tmp_path):
    library, path = tuning.TABLE.read_text(), tmp_path / "tuned.json"
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "benchmarks.tune", "--tiny", "--write", str(path)]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-1000:]
    assert set(json.loads(path.read_text())["cpu"]["launches"]) == PROGRAMS
    assert tuning.TABLE.read_text() == library
