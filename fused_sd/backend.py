"""Which row functions run: Triton on a GPU, PyTorch elsewhere.  The only place that decides."""

import importlib
import os
from types import ModuleType

import torch

from fused_sd import checks, rows

Rows = ModuleType  # fused_sd.rows or fused_sd.kernels.rows: the same names


def choose_rows(backend: str, device: torch.device, dtype: torch.dtype) -> Rows:
    """The module of row functions for logits of a dtype on a device.

    Raises:
        ValueError: when Triton is asked for where it cannot run.
    """
    checks.check_backend_choice(backend)
    if backend == "torch":
        return rows
    gpu = device.type == "cuda"
    if backend == "auto" and (not gpu or dtype == torch.float64):
        return rows
    if dtype == torch.float64:
        checks.fail("backend", "be 'torch' for float64", repr(backend), "the kernels are fp32")
    if not gpu and os.environ.get("TRITON_INTERPRET") != "1":
        checks.fail(
            "backend",
            f"be 'torch' or 'auto' on {device.type}",
            repr(backend),
            "Triton needs a GPU (or TRITON_INTERPRET=1 set before its first import)",
        )
    try:
        return importlib.import_module("fused_sd.kernels.rows")
    except ModuleNotFoundError as error:
        raise ValueError(
            f"backend must be 'torch' where Triton is not installed, got {backend!r}; "
            f"install triton or pass backend='torch' ({error})"
        ) from error
