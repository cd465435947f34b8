"""Objectives over whole rows of logits in Triton: the twin of ``fused_sd/torch_kernels/rows.py``.

Both modules have the same functions with the same arguments and results; the twin's docstrings
describe the arguments.  Here each function launches a program of ``programs/``, one for each row.

A row is read from memory as few times as its loss allows:

* once for its normalisers.  ``normalizers`` reads student and teacher together and leaves the state
  of each pair, five numbers (``programs/rows.py``) that later programs start from;
* once more for loss and gradient together, if the loss is a KL, a cross entropy or a policy loss;
* a third time if the loss is a JSD or has an entry clip or a token clip.  Their gradient needs a
  sum over the row, or the loss itself, before its first entry can be written.

Metrics of whole rows are found in the read that finds the loss.  Only a truncated support, whose
loss reads no whole rows, has a read of its own for them.

Dimension key:  C rows in a chunk, W columns
"""

from collections.abc import Collection
from typing import Any

import torch
import triton
from torch import Tensor

from fused_sd.head.vocab_shard import WHOLE, VocabShard
from fused_sd.kernels.divergence import jsd_parameter, program_arguments
from fused_sd.kernels.programs import row_gradients
from fused_sd.kernels.programs import rows as row_programs
from fused_sd.kernels.tuning import launch, launch_for
from fused_sd.terms.divergence_term import DivergenceTerm
from fused_sd.torch_kernels.rows import (
    ROW_METRIC_TERMS,
    ROW_METRICS,
    Compared,
    EntryGradient,
    Normalizers,
    RowGradient,
)

READS_PADDING = True  # rows are read with their padding, 16 bytes at a time for any vocabulary
STATE = 8  # numbers that a pair's state takes: five, padded to one 32-byte sector of memory


def log_normalizer(logits: Tensor) -> Tensor:
    """Log-sum-exp of each row: (C,) fp64."""
    lse = logits.new_empty(logits.shape[0], dtype=torch.float64)
    _launch(
        row_programs.log_normalizer,
        logits,
        **_one_side(logits),
        lse_ptr=lse,
        entropy_ptr=None,
    )
    return lse


def lse_and_entropy(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Log-sum-exp of each row, fp64, and its entropy in nats: (C,) each."""
    entropy = logits.new_empty(logits.shape[0])
    lse = torch.empty_like(entropy, dtype=torch.float64)
    _launch(
        row_programs.log_normalizer,
        logits,
        **_one_side(logits),
        lse_ptr=lse,
        entropy_ptr=entropy,
    )
    return lse, entropy


def normalizers(
    student: Tensor, teacher: Tensor, shard: VocabShard = WHOLE, has_largest: bool = False
) -> Normalizers:
    """Log-sum-exps of both sides' rows, from one read, and the state of each pair: (C, STATE)."""
    num_rows = student.shape[0]
    largest = None
    if has_largest:
        largest = torch.empty((num_rows, 2), dtype=torch.int64, device=student.device)
    state = student.new_empty((num_rows, STATE))
    lses = student.new_empty((2, num_rows), dtype=torch.float64)
    _launch(
        row_programs.normalizers,
        student,
        **_both_sides(student, teacher, state),
        student_lse_ptr=lses[0],
        teacher_lse_ptr=lses[1],
        largest_ptr=largest,
    )
    if not shard.alone:
        _join_ranks_(state, shard)
        lses = (state[:, 0:4:2].double() + state[:, 1:4:2]).T
    return Normalizers(lses[0], lses[1], state, shard, largest)


def known_normalizers(student: Tensor, teacher: Tensor, shard: VocabShard = WHOLE) -> Normalizers:
    """Normalisers of which the log-sum-exps (C,) are known, for ``row_metrics`` alone."""
    state = student.new_zeros((student.shape[0], STATE), dtype=torch.float32)  # no mean ratio
    lses = torch.stack([student, teacher], 1)
    state[:, :4:2] = lses  # rounded
    state[:, 1:4:2] = lses - state[:, :4:2]
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
    """Sum a divergence's terms over the vocabulary and, where asked for, write the gradient.

    The metrics are summed by the program that sums the loss, so that they need no read of the rows
    of their own, and a metric that is the loss itself is not computed again.
    """
    shard = normalizers.shard
    mean_share = None if entry_clip is not None else term.share_of_mean_ratio
    has_total = gradient is not None and mean_share is None
    loss = student.new_empty(student.shape[0])
    total = torch.empty_like(loss) if has_total else None
    clipped = torch.empty_like(loss) if entry_clip is not None else None
    is_metric = entry_clip is None and ROW_METRIC_TERMS.get(term.name) == term
    beside = [name for name in names if not (is_metric and name == term.name)]
    metrics = student.new_empty((len(beside), student.shape[0]))
    places = _metric_places(dict(zip(beside, metrics)))
    compared = {
        **_both_sides(student, teacher, normalizers.state),
        **program_arguments(term),
        "balance": term.balance,
        "clip": entry_clip,
    }
    if gradient is None or has_total:
        _launch(
            row_gradients.divergence,
            student,
            **compared,
            **places,
            loss_ptr=loss,
            total_ptr=total,
            clipped_ptr=clipped,
        )
        places = _metric_places({})
        loss, total, clipped = _sum_present(shard, loss, total, clipped)
    if gradient is not None:
        row_weights, cap, out = gradient
        _launch(
            row_gradients.divergence_gradient,
            student,
            **compared,
            **places,
            loss_ptr=loss,
            total_ptr=total,
            row_weights_ptr=row_weights,
            out_ptr=out,
            out_stride=out.stride(0),
            share_of_mean_ratio=mean_share,
            inverse_cap=None if cap is None else 1 / cap,
            IN_PLACE=out.dtype == student.dtype,
        )
        if not has_total:
            [loss] = shard.sum(loss)
    if beside:
        [metrics] = shard.sum(metrics)
    found = {term.name: loss, **dict(zip(beside, metrics))}
    return Compared(loss, clipped, {name: found[name] for name in names})


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
    """The named metrics of ``ROW_METRICS``, each (C,), from one read of the rows."""
    metrics = student.new_empty((len(names), student.shape[0]))
    _launch(
        row_programs.row_metrics,
        student,
        **_both_sides(student, teacher, normalizers.state),
        **_metric_places(dict(zip(names, metrics))),
    )
    [metrics] = normalizers.shard.sum(metrics)
    return dict(zip(names, metrics))


def _metric_places(places: dict[str, Tensor]) -> dict[str, Any]:
    """Arguments of a program that sums metrics, with the place (C,) of each that it sums."""
    jsd = jsd_parameter(ROW_METRIC_TERMS["jsd"].parameter) if "jsd" in places else None
    return {
        "metric_ptrs": tuple(places.get(name) for name in ROW_METRICS),
        "jsd_parameter": jsd,
    }


def _sum_present(shard: VocabShard, *parts: Tensor | None) -> list[Any]:
    """Add the parts of all ranks that there are; None stays None."""
    sums = iter(shard.sum(*(part for part in parts if part is not None)))
    return [part if part is None else next(sums) for part in parts]


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
