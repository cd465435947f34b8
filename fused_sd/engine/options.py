"""How a loss runs, whatever it is: the settings that every loss takes and hands to the walk."""

from typing import NamedTuple

import torch.distributed as dist

from fused_sd import checks
from fused_sd.engine.certificate import checked_tolerance


class Execution(NamedTuple):
    """How a walk runs, beside what it computes."""

    compact: bool
    backend: str
    chunk_size: int | None
    process_group: "dist.ProcessGroup | None"
    reduce_dhidden: bool
    tolerance: float | None  # of a certified sparse gradient; None: a dense one


def execution(
    gradient: str,
    tolerance: float | None,
    compact: bool,
    backend: str,
    chunk_size: int | None,
    process_group: "dist.ProcessGroup | None",
    reduce_dhidden: bool,
) -> Execution:
    """The settings, checked."""
    checks.check_backend_choice(backend)
    if chunk_size is not None:
        checks.check_positive_int("chunk_size", chunk_size)
    return Execution(
        compact,
        backend,
        chunk_size,
        process_group,
        reduce_dhidden,
        checked_tolerance(gradient, tolerance),
    )
