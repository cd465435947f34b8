"""Objectives over whole rows of logits in Triton: the twin of ``fused_sd/torch_kernels/rows.py``.

Both modules have the same functions with the same arguments and results; the twin's docstrings
describe the arguments.  Here each function launches a program of ``programs/``, one for each row.

A row is read from memory as few times as its loss allows:

* once for its normalisers.  ``normalizers`` reads student and teacher together and leaves the state
  of each pair, five numbers (``programs/rows.py``) that later programs start from;
* once more for loss and gradient together, if the loss is a KL, a cross entropy or a policy loss;
* a third time if the loss is a JSD or has an entry clip or a token clip.  Their gradient needs a
  sum over the row, or the loss itself, before its first entry can be written.

Dimension key:  C rows in a chunk, W columns
"""

from collections.abc import Collection
from typing import Any

import torch
import triton
from torch import Tensor

from fused_sd.head.vocab_shard import WHOLE, VocabShard
from fused_sd.kernels.divergence import program_arguments
from fused_sd.kernels.programs import row_gradients
from fused_sd.kernels.programs import rows as row_programs
from fused_sd.kernels.tuning import launch, launch_for
from fused_sd.terms.divergence_term import DivergenceTerm
from fused_sd.torch_kernels.rows import (
    ROW_METRICS,
    Compared,
    EntryGradient,
    Normalizers,
    RowGradient,
)

READS_PADDING = True  # rows are read with their padding, 16 bytes at a time for any vocabulary
STATE = 8  # numbers that a pair's state takes: five, padded to one 32-byte sector of memory


def log_normalizer(logits: Tensor) -> Tensor:
    """Log-sum-exp of each row: (C,)."""
    lse = logits.new_empty(logits.shape[0])
    _launch(
        row_programs.log_normalizer,
        logits,
        **_one_side(logits),
        lse_ptr=lse,
        entropy_ptr=None,
    )
    return lse


def lse_and_entropy(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Log-sum-exp of each row and its entropy in nats: (C,) each."""
    lse, entropy = (logits.new_empty(logits.shape[0]) for _ in range(2))
    _launch(
        row_programs.log_normalizer,
        logits,
        **_one_side(logits),
        lse_ptr=lse,
        entropy_ptr=entropy,
    )
    return lse, entropy


def normalizers(student: Tensor, teacher: Tensor, shard: VocabShard = WHOLE) -> Normalizers:
    """Log-sum-exps of both sides' rows, from one read, and the state of each pair: (C, STATE)."""
    state = student.new_empty((student.shape[0], STATE))
    _launch(row_programs.normalizers, student, **_both_sides(student, teacher, state))
    if not shard.alone:
        _join_ranks_(state, shard)
    return Normalizers(state[:, 0] + state[:, 1], state[:, 2] + state[:, 3], state, shard)


def known_normalizers(student: Tensor, teacher: Tensor, shard: VocabShard = WHOLE) -> Normalizers:
    """Normalisers of which the log-sum-exps (C,) are known, for ``row_metrics`` alone."""
    state = student.new_zeros((student.shape[0], STATE))  # without a mean log-ratio
    state[:, 0], state[:, 2] = student, teacher
    return Normalizers(student, teacher, state, shard)


def divergence_(
    student: Tensor,
    teacher: Tensor,
    normalizers: Normalizers,
    term: DivergenceTerm,
    entry_clip: float | None,
    gradient: RowGradient | None,
    names: Collection[str] = (),
) -> Compared:
    """Sum a divergence's terms over the vocabulary and, where asked for, write the gradient."""
    metrics = {}
    if names:
        metrics = row_metrics(student, teacher, normalizers, names)
    shard = normalizers.shard
    loss, total = (torch.empty_like(normalizers.student) for _ in range(2))
    clipped = torch.zeros_like(loss)
    compared = {
        **_both_sides(student, teacher, normalizers.state),
        **program_arguments(term),
        "balance": term.balance,
        "clip": entry_clip,
    }
    mean_share = None if entry_clip is not None else term.share_of_mean_ratio
    if gradient is None or mean_share is None:
        _launch(
            row_gradients.divergence,
            student,
            **compared,
            loss_ptr=loss,
            total_ptr=total,
            clipped_ptr=clipped,
        )
        loss, total, clipped = shard.sum(loss, total, clipped)
    if gradient is not None:
        row_weights, cap, out = gradient
        _launch(
            row_gradients.divergence_gradient,
            student,
            **compared,
            loss_ptr=loss,
            total_ptr=total if mean_share is None else None,
            row_weights_ptr=row_weights,
            out_ptr=out,
            out_stride=out.stride(0),
            share_of_mean_ratio=mean_share,
            inverse_cap=None if cap is None else 1 / cap,
            IN_PLACE=out.dtype == student.dtype,
        )
        if mean_share is not None:
            [loss] = shard.sum(loss)
    return Compared(loss, None if entry_clip is None else clipped, metrics)


def softmax_gradient_(
    logits: Tensor,
    normalizer: Tensor,
    constant: Tensor,
    slope: Tensor | None,
    cap: float | None,
    out: Tensor,
    entries: EntryGradient | None = None,
) -> None:
    """Write ``exp(x) * (constant + slope * x)`` with ``x = logits - normalizer`` to ``out``."""
    columns = values = chosen = row_weights = None
    num_entries = 0
    if entries is not None:
        columns, chosen, values = (part.contiguous() for part in entries[:3])
        row_weights, num_entries = entries.row_weights, columns.shape[1]
    _launch(
        row_gradients.softmax_gradient,
        logits,
        **_one_side(logits),
        normalizer_ptr=normalizer,
        constant_ptr=constant,
        slope_ptr=slope,
        out_ptr=out,
        out_stride=out.stride(0),
        inverse_cap=None if cap is None else 1 / cap,
        row_weights_ptr=row_weights,
        columns_ptr=columns,
        values_ptr=values,
        entries_ptr=chosen,
        num_entries=num_entries,
        ENTRIES=triton.next_power_of_2(max(1, num_entries)),
        IN_PLACE=out.dtype == logits.dtype,
    )


def row_metrics(
    student: Tensor,
    teacher: Tensor,
    normalizers: Normalizers,
    names: Collection[str],
) -> dict[str, Tensor]:
    """The named metrics of ``ROW_METRICS``, each (C,); one read of the rows finds all of them."""
    out = student.new_empty((len(ROW_METRICS), student.shape[0]))
    _launch(
        row_programs.row_metrics,
        student,
        **_both_sides(student, teacher, normalizers.state),
        out_ptr=out,
        out_stride=out.stride(0),
    )
    [out] = normalizers.shard.sum(out)
    return {name: values for name, values in zip(ROW_METRICS, out) if name in names}


def _join_ranks_(state: Tensor, shard: VocabShard) -> None:
    """Turn the states (C, STATE) of this rank's columns into those of all ranks' columns."""
    anchor, log_scale = state[:, :4:2].clone(), state[:, 1:4:2]
    gap = state[:, 4] + (anchor[:, 0] - anchor[:, 1]) + (log_scale[:, 0] - log_scale[:, 1])
    top = shard.max(anchor)
    share = torch.exp((anchor - top) + log_scale)
    weighted = torch.where(share[:, 0] == 0, 0, share[:, 0] * gap)  # by the logits' difference
    scale, weighted = shard.sum(share, weighted)
    log_scale = scale.log()
    state[:, :4:2], state[:, 1:4:2] = top, log_scale
    shift = (top[:, 0] - top[:, 1]) + (log_scale[:, 0] - log_scale[:, 1])
    state[:, 4] = weighted / scale[:, 0] - shift


def _launch(program: Any, rows: Tensor, **arguments: Any) -> None:
    """Launch one program for each of the rows.

    A tensor with one number for each row is made contiguous: programs read it with stride 1.
    """
    chosen = launch_for(program.__name__, rows.device)
    dense = {
        name: value.contiguous() if isinstance(value, Tensor) and value.dim() == 1 else value
        for name, value in arguments.items()
    }
    launch(
        program,
        rows.shape[0],
        rows,
        **dense,
        BLOCK_V=min(chosen.block_v, triton.next_power_of_2(rows.shape[1])),
        num_warps=chosen.num_warps,
    )


def _one_side(logits: Tensor) -> dict[str, Any]:
    """Arguments of a program that reads one side."""
    return {"logits_ptr": logits, "stride": logits.stride(0), "num_columns": logits.shape[1]}


def _both_sides(student: Tensor, teacher: Tensor, state: Tensor) -> dict[str, Any]:
    """Arguments of a program that compares the sides."""
    return {
        "student_ptr": student,
        "teacher_ptr": teacher,
        "student_stride": student.stride(0),
        "teacher_stride": teacher.stride(0),
        "num_columns": student.shape[1],
        "state_ptr": state,
        "STATE": STATE,
    }
