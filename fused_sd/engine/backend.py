"""Which kernels run: Triton's on a GPU, PyTorch's elsewhere.  The only place that decides.

The kernels of both backends are modules with the same functions and arguments (twins):
``rows.py`` of ``torch_kernels`` and of ``kernels`` work on whole rows of logits, ``entries.py`` on
chosen entries of them, ``sparse.py`` on gradients of few entries.  An objective calls them through
``chunk.functions`` and never asks which they are.
"""

import importlib
import os
from types import ModuleType
from typing import NamedTuple

import torch

from fused_sd import checks
from fused_sd.torch_kernels import entries, rows, sparse


class Functions(NamedTuple):
    """The modules of one backend."""

    rows: ModuleType  # functions on whole rows of logits
    sparse: ModuleType  # functions on gradients of few entries, and the search for them
    entries: ModuleType  # functions on chosen entries of rows


TORCH = Functions(rows, sparse, entries)


def choose_functions(backend: str, device: torch.device, dtype: torch.dtype) -> Functions:
    """The kernels for logits of a dtype on a device.

    Args:
        backend: ``"auto"``, ``"triton"`` or ``"torch"``.

    Raises:
        ValueError: when Triton is asked for where it cannot run.
    """
    checks.check_backend_choice(backend)
    if backend == "torch":
        return TORCH
    gpu = device.type == "cuda"
    if backend == "auto" and (not gpu or dtype == torch.float64):
        return TORCH
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
        return Functions(
            *(importlib.import_module(f"fused_sd.kernels.{n}") for n in Functions._fields)
        )
    except ModuleNotFoundError as error:
        raise ValueError(
            f"backend must be 'torch' where Triton is not installed, got {backend!r}; "
            f"install triton or pass backend='torch' ({error})"
        ) from error
