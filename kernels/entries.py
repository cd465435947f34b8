"""Chosen entries of rows of logits in Triton: the twin of ``fused_sd/torch_kernels/entries.py``.

Both modules have the same functions with the same arguments and results; the twin's docstrings
describe the arguments.  A row's entries fit into the registers of one program; where they are too
many, PyTorch compares them.

Dimension key:  C rows in a chunk, W columns, K chosen entries of a row
"""

import torch
import triton
from torch import Tensor

from fused_sd.kernels.divergence import program_arguments
from fused_sd.kernels.programs import entries as programs
from fused_sd.kernels.tuning import launch, launch_for
from fused_sd.terms.buckets import EntryTerms
from fused_sd.terms.divergence_term import DivergenceTerm
from fused_sd.torch_kernels import entries as twin

MOST = 8192  # buckets that a program holds


def take_out_(logits: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
    """Read a row's entries, and make them -inf; also the log-sum-exp of what is left."""
    num_rows, k = columns.shape
    if k > MOST:
        return twin.take_out_(logits, columns)
    entries = logits.new_empty((num_rows, k))
    rest = logits.new_empty(num_rows, dtype=torch.float64)
    chosen = launch_for("log_normalizer", logits.device)  # whose loop it runs
    launch(
        programs.take_out,
        num_rows,
        logits,
        logits_ptr=logits,
        stride=logits.stride(0),
        num_columns=logits.shape[1],
        columns_ptr=columns.contiguous(),
        num_entries=k,
        entries_ptr=entries,
        rest_ptr=rest,
        ENTRIES=triton.next_power_of_2(k),
        BLOCK_V=min(chosen.block_v, triton.next_power_of_2(logits.shape[1])),
        num_warps=chosen.num_warps,
    )
    return entries, rest


def compare_entries(
    student: Tensor,
    teacher: Tensor,
    rests: tuple[Tensor, Tensor] | None,
    term: DivergenceTerm,
    entry_clip: float | None,
) -> EntryTerms:
    """A divergence over K entries of each row and, where rests are given, a bucket for others."""
    num_rows, k = student.shape
    buckets = triton.next_power_of_2(k + 1)
    if buckets > MOST:
        return twin.compare_entries(student, teacher, rests, term, entry_clip)
    loss, clipped, outside = student.new_empty((3, num_rows))
    background, *lses = student.new_empty((3, num_rows), dtype=torch.float64)
    inside = student.new_empty((num_rows, k))
    launch(
        programs.compare_entries,
        num_rows,
        student,
        student_ptr=student.contiguous(),
        teacher_ptr=teacher.contiguous(),
        student_rest_ptr=None if rests is None else rests[0].contiguous(),
        teacher_rest_ptr=None if rests is None else rests[1].contiguous(),
        num_entries=k,
        loss_ptr=loss,
        clipped_ptr=None if entry_clip is None else clipped,
        inside_ptr=inside,
        outside_ptr=outside,
        background_ptr=background,
        student_lse_ptr=lses[0],
        teacher_lse_ptr=lses[1],
        **program_arguments(term),
        balance=term.balance,
        clip=entry_clip,
        BUCKETS=buckets,
        num_warps=max(1, min(8, buckets // 128)),
    )
    cut = None if entry_clip is None else clipped
    if rests is None:
        return EntryTerms(loss, cut, inside, None, None, None)
    return EntryTerms(loss, cut, inside, outside, background, (lses[0], lses[1]))
