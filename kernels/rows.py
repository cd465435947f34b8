"""Row functions in Triton: the twin of ``fused_sd/rows.py``, with the same names and arguments.

One program of ``programs.py`` walks one row.

Dimension key:  C rows in a chunk, V columns (with padding columns of -inf)
"""

from collections.abc import Collection

import torch
import triton
from torch import Tensor

from fused_sd.chunking import gradient_view
from fused_sd.divergence import DivergenceTerm
from fused_sd.kernels import programs
from fused_sd.kernels.divergence import TERMS
from fused_sd.rows import SUMMARY
from fused_sd.support import BLOCK

BLOCK_V = 2048  # columns a program holds at a time: two sides and their terms fit the registers
NUM_WARPS = 8
SEGMENT = 32  # blocks whose maxima one program finds


def log_normalizer(logits: Tensor) -> Tensor:
    """Log-sum-exp of each row: (C,)."""
    lse = logits.new_empty(logits.shape[0])
    _launch(programs.log_normalizer, logits, logits, logits.stride(0), logits.shape[1], lse)
    return lse


def entropy(logits: Tensor, lse: Tensor) -> Tensor:
    """Entropy of each row in nats: (C,)."""
    out = torch.empty_like(lse)
    _launch(programs.entropy, logits, logits, logits.stride(0), logits.shape[1], lse, out)
    return out


def divergence(
    student: Tensor,
    teacher: Tensor,
    lse_s: Tensor,
    lse_t: Tensor,
    term: DivergenceTerm,
    entry_clip: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Sum of a divergence's terms over the vocabulary; see the twin."""
    loss, total, clipped = (torch.empty_like(lse_s) for _ in range(3))
    _launch(
        programs.divergence,
        student,
        *_pair(student, teacher, lse_s, lse_t),
        *(loss, total, clipped),
        *_settings(term, entry_clip),
        **_constants(term, entry_clip),
    )
    return loss, total, clipped


def divergence_gradient_(
    student: Tensor,
    teacher: Tensor,
    lse_s: Tensor,
    lse_t: Tensor,
    term: DivergenceTerm,
    entry_clip: float | None,
    total: Tensor,
    upstream: Tensor,
    cap: float | None,
    dtype: torch.dtype,
) -> Tensor:
    """Gradient of ``sum(upstream * loss)`` by the logits before the soft-cap; see the twin."""
    out = gradient_view(student, dtype)
    _launch(
        programs.divergence_gradient,
        student,
        *_pair(student, teacher, lse_s, lse_t),
        *(total, upstream, out, out.stride(0)),
        *_settings(term, entry_clip),
        1.0 if cap is None else 1 / cap,
        **_constants(term, entry_clip),
        HAS_CAP=cap is not None,
    )
    return out


def softmax_gradient_(
    logits: Tensor,
    normalizer: Tensor,
    constant: Tensor,
    slope: Tensor | None,
    cap: float | None,
    dtype: torch.dtype,
) -> Tensor:
    """``exp(x) * (constant + slope * x)`` with ``x = logits - normalizer``; see the twin."""
    out = gradient_view(logits, dtype)
    _launch(
        programs.softmax_gradient,
        logits,
        *(logits, logits.stride(0), logits.shape[1], normalizer, constant),
        *(constant if slope is None else slope, out, out.stride(0)),
        1.0 if cap is None else 1 / cap,
        HAS_SLOPE=slope is not None,
        HAS_CAP=cap is not None,
    )
    return out


def summary(
    student: Tensor, teacher: Tensor, lse_s: Tensor, lse_t: Tensor, names: Collection[str]
) -> dict[str, Tensor]:
    """What a row of both sides says: one pass finds all that can be named; see the twin."""
    out = lse_s.new_empty((len(SUMMARY), lse_s.shape[0]))
    _launch(programs.summary, student, *_pair(student, teacher, lse_s, lse_t), out, out.stride(0))
    return {name: values for name, values in zip(SUMMARY, out) if name in names}


def block_maxima(logits: Tensor) -> Tensor:
    """The largest logit of every ``BLOCK`` columns: (C, ceil(V / BLOCK))."""
    num_rows, num_columns = logits.shape
    num_blocks = triton.cdiv(num_columns, BLOCK)
    out = logits.new_empty((num_rows, num_blocks))
    num_segments = triton.cdiv(num_blocks, SEGMENT)
    if num_rows:
        programs.block_maxima[(num_rows * num_segments,)](
            *(logits, logits.stride(0), num_columns, out, num_blocks, num_segments),
            BLOCK=BLOCK,
            SEGMENT=SEGMENT,
            num_warps=NUM_WARPS,
        )
    return out


def _launch(kernel, like: Tensor, *arguments, **constants) -> None:
    """One program for each row; what has one number for each row is read with stride 1."""
    if like.shape[0]:
        block = min(BLOCK_V, triton.next_power_of_2(like.shape[1]))
        dense = (
            argument.contiguous()
            if isinstance(argument, Tensor) and argument.dim() == 1
            else argument
            for argument in arguments
        )
        kernel[(like.shape[0],)](*dense, **constants, BLOCK_V=block, num_warps=NUM_WARPS)


def _pair(student: Tensor, teacher: Tensor, lse_s: Tensor, lse_t: Tensor) -> tuple:
    strides = student.stride(0), teacher.stride(0)
    return student, teacher, *strides, student.shape[1], lse_s, lse_t


def _settings(term: DivergenceTerm, entry_clip: float | None) -> tuple[float, float, float]:
    return term.parameter, term.slope, 0.0 if entry_clip is None else entry_clip


def _constants(term: DivergenceTerm, entry_clip: float | None) -> dict[str, object]:
    return {"DIVERGENCE": TERMS[term.name], "HAS_CLIP": entry_clip is not None}
