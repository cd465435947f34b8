"""Checks of the arguments of ``fused_sd.plan``."""

from typing import get_args

import torch

from fused_sd import checks
from fused_sd.engine.certificate import GradientKind
from fused_sd.measuring.dtypes import DTYPES
from fused_sd.planning.objectives import PlannedObjective

PLANNED_DTYPES = ("bf16", "fp16", "fp32")


def check_sizes(
    tokens: int,
    world_size: int,
    tensor_parallel: int,
    reduction: object,
    masked: float,
    chunk_size: int | None,
) -> None:
    """Check numbers of tokens and ranks, the reduction, the masked share and the chunk size."""
    counts = {"tokens": tokens, "tensor_parallel": tensor_parallel, "world_size": world_size}
    for name, value in counts.items():
        checks.check_positive_int(name, value)
    if world_size % tensor_parallel:
        checks.fail(
            "world_size",
            f"be a multiple of tensor_parallel, {tensor_parallel}",
            world_size,
            "count all ranks, including those that share a head",
        )
    checks.check_reduction(reduction)
    ok = isinstance(masked, int | float) and 0 <= masked < 1
    checks.check_number("masked", masked, "lie in [0, 1)", ok, "0.5 leaves half of the tokens")
    if chunk_size is not None:
        checks.check_positive_int("chunk_size", chunk_size)


def check_gradient(
    gradient: object, kept: int | None, dense_share: float | None, objective: PlannedObjective
) -> None:
    """Check the kind of gradient, and the assumptions about a sparse one."""
    checks.check_one_of("gradient", gradient, get_args(GradientKind))
    if gradient == "dense":
        for name, value in (("kept", kept), ("dense_share", dense_share)):
            if value is not None:
                remedy = "pass one of them, or leave it out"
                checks.fail(name, "come with gradient='sparse' or 'auto'", repr(value), remedy)
        return
    if objective.is_per_token:
        remedy = "leave it out: log-probabilities have dense gradients"
        checks.fail("gradient", "be 'dense' for token_log_probs", repr(gradient), remedy)
    if kept is not None:
        checks.check_positive_int("kept", kept)
    if dense_share is not None:
        ok = isinstance(dense_share, int | float) and 0 <= dense_share <= 1
        checks.check_number("dense_share", dense_share, "lie in [0, 1]", ok, "0.1 is one in ten")


def dtype_name(dtype: torch.dtype | str) -> str:
    """Return the name of a dtype that is given by its name or itself."""
    for name in PLANNED_DTYPES:
        if isinstance(dtype, str | torch.dtype) and dtype in (name, DTYPES[name]):
            return name
    checks.fail("dtype", "be bf16, fp16 or fp32", repr(dtype), "plan for the operands' dtype")
    raise AssertionError
