"""Which kernels run where."""

import pytest
import torch

from fused_sd.engine.backend import TORCH, choose_functions

CPU, GPU = torch.device("cpu"), torch.device("cuda")


def test_a_cpu_runs_pytorch_unless_the_interpreter_is_asked_for(monkeypatch):
    for backend in ("auto", "torch"):
        assert choose_functions(backend, CPU, torch.float32) is TORCH
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match="backend must be 'torch' or 'auto' on cpu, got 'triton'"):
        choose_functions("triton", CPU, torch.float32)
    with pytest.raises(ValueError, match="backend must be one of"):
        choose_functions("cuda", CPU, torch.float32)


def test_kernels_are_fp32():
    for backend in ("auto", "torch"):
        assert choose_functions(backend, GPU, torch.float64) is TORCH
    with pytest.raises(ValueError, match="backend must be 'torch' for float64, got 'triton'"):
        choose_functions("triton", GPU, torch.float64)


@pytest.mark.parametrize(
    "backend, device, interprets", [("auto", GPU, "0"), ("triton", GPU, "0"), ("triton", CPU, "1")]
)
def test_triton_runs_on_a_gpu_and_in_its_interpreter(backend, device, interprets, monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_INTERPRET", interprets)
    names = [module.__name__ for module in choose_functions(backend, device, torch.float32)]
    assert names == [f"fused_sd.kernels.{name}" for name in ("rows", "sparse", "entries")]
