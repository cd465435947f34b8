"""Kernels are compiled for an absent GPU into a cache that is found again."""

import os
import pathlib
import subprocess
import sys

import pytest

pytest.importorskip("triton")
from benchmarks import prime

ROOT = pathlib.Path(__file__).parents[2]
FEW = (
    "from benchmarks import offline, prime\n"
    "prime.CANDIDATES, prime.VOCABULARIES = prime.CANDIDATES[:1], (1000,)\n"
    "offline.launch_all = lambda *given: None\n"
    "from benchmarks import tune\n"
    "prime.make_tasks = lambda *given: tune.make_tasks(*given)[:2]\n"
    "raise SystemExit(prime.main([]))\n"
)


def test_a_second_run_compiles_nothing(tmp_path):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(ROOT)}
    written = []
    for _ in range(2):
        run = subprocess.run(
            [sys.executable, "-c", FEW], env=environment, capture_output=True, text=True
        )
        assert run.returncode == 0, run.stderr[-1000:]
        assert "launches compiled for sm_90" in run.stdout
        written.append({p: p.stat().st_mtime_ns for p in tmp_path.rglob("*.cubin")})
    names = {path.stem for path in written[0]}
    assert {"log_normalizer", "normalizers"} <= names
    assert written[0] == written[1]


def test_wrong_use_says_what_to_do(monkeypatch, capsys):
    monkeypatch.delenv("TRITON_CACHE_DIR", raising=False)
    assert prime.main([]) == 2
    assert "TRITON_CACHE_DIR must name a folder" in capsys.readouterr().err
    monkeypatch.setenv("TRITON_CACHE_DIR", "/nowhere")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert prime.main([]) == 2
    assert "TRITON_INTERPRET must be unset" in capsys.readouterr().err
