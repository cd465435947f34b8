"""Triton programs for truncated rows: chosen entries are taken out of them, and compared.

The support of a truncated row has K entries; a tail bucket may hold all others.  ``take_out`` reads
one side's entries and measures what is left; ``compare_entries`` holds both sides' buckets of a row
in the registers of one program, so that a comparison of few numbers is one launch and not fifty.

Dimension key:  C rows in a chunk, W columns, K entries of a row
"""

import triton
import triton.language as tl

from fused_sd.kernels.divergence import exp
from fused_sd.kernels.programs.row_gradients import clipped_term
from fused_sd.kernels.programs.rows import LOWEST, block_range, load_logits, online_lse_step


@triton.jit
def take_out(
    logits_ptr,  # (C, W) fp32, unit stride in the columns; -inf is written at the columns
    stride,  # elements from one row of the logits to the next
    num_columns,  # W
    columns_ptr,  # (C, K) int64 in [0, W), contiguous
    num_entries,  # K
    entries_ptr,  # (C, K) fp32, contiguous, written: the logits at the columns
    rest_ptr,  # (C,) fp64, written: log-sum-exp of the row without them
    ENTRIES: tl.constexpr,  # K or the next power of 2
    BLOCK_V: tl.constexpr,  # columns that are read at a time
):
    """Take entries out of a row, and find the log-sum-exp of what is left; reads the row once.

    One program a row.  ``take_out_`` in ``kernels/entries.py`` launches it for the exact tail.  The
    tail is not found as the whole row less the entries: that difference has no digits where they
    hold nearly all mass.
    """
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * stride
    place = tl.arange(0, ENTRIES)
    exists = place < num_entries
    columns = tl.load(columns_ptr + row * num_entries + place, mask=exists, other=0)
    entries = tl.load(logits_ptr + columns, mask=exists, other=-float("inf"))
    tl.store(entries_ptr + row * num_entries + place, entries, mask=exists)
    tl.debug_barrier()  # several places may have one column: all are read before any is written
    tl.store(logits_ptr + columns, tl.full([ENTRIES], -float("inf"), tl.float32), mask=exists)
    tl.debug_barrier()  # other threads read what was written
    anchor = tl.full([BLOCK_V], LOWEST, tl.float32)
    scale = tl.zeros([BLOCK_V], tl.float32)
    for is_tail in tl.static_range(2):
        begin, end = block_range(num_columns, is_tail, BLOCK_V)
        for start in range(begin, end, BLOCK_V):
            offs_v = start + tl.arange(0, BLOCK_V)
            z = load_logits(logits_ptr, offs_v, num_columns, is_tail)
            anchor, decay, weight = online_lse_step(z, anchor)
            scale = decay * scale + weight
    top = tl.max(anchor, axis=0)
    total = tl.sum(scale * exp(anchor - top), axis=0)
    tl.store(rest_ptr + row, top.to(tl.float64) + tl.log(total))


@triton.jit
def load_buckets(entries_ptr, rest_ptr, row, place, num_entries):
    """Load a row's entries and, behind them, its tail if there is one: -inf in other places.

    Returns:
        log_probs: log-probabilities over the buckets; -inf everywhere where no bucket has mass.
        lse: log-sum-exp of the buckets, fp64.
    """
    exists = place < num_entries
    z = tl.load(entries_ptr + row * num_entries + place, mask=exists, other=-float("inf"))
    anchor = tl.maximum(tl.max(z, axis=0), LOWEST)
    if rest_ptr is not None:
        rest = tl.load(rest_ptr + row)
        anchor = tl.maximum(anchor, rest.to(tl.float32))
        tail = (rest - anchor.to(tl.float64)).to(tl.float32)
        below = tl.where(place == num_entries, tail, z - anchor)
    else:
        below = z - anchor
    total = tl.sum(exp(below), axis=0)
    log_scale = tl.where(total == 0, 0.0, tl.log(total))
    lse = anchor.to(tl.float64) + log_scale
    return below - log_scale, tl.where(total == 0, -float("inf"), lse)


@triton.jit
def compare_entries(
    student_ptr,  # (C, K) fp32 logits, contiguous
    teacher_ptr,  # (C, K) fp32 logits, contiguous
    student_rest_ptr,  # (C,) fp64 or None, log-sum-exp of the student's other logits
    teacher_rest_ptr,  # (C,) fp64 or None, as the student's
    num_entries,  # K
    loss_ptr,  # (C,) fp32, written: sum of the terms
    clipped_ptr,  # (C,) fp32 or None, written: number of buckets that were cut
    inside_ptr,  # (C, K) fp32, contiguous, written: gradient of the loss at the entries
    outside_ptr,  # (C,) fp32, written with rests: its factor of exp(z - background) elsewhere
    background_ptr,  # (C,) fp64, written with rests: the student's rest, 0 where it is -inf
    student_lse_ptr,  # (C,) fp64, written with rests: log-sum-exp of the student's whole row
    teacher_lse_ptr,  # (C,) fp64, written with rests: log-sum-exp of the teacher's whole row
    parameter,  # what the divergence takes, by program_arguments in kernels/divergence.py
    balance,  # float, DivergenceTerm.balance: plain term = balanced term + balance * (s - t)
    clip,  # float or None, largest plain term
    DIVERGENCE: tl.constexpr,  # function of kernels/divergence.py, inlined
    BUCKETS: tl.constexpr,  # entries and tail, or the next power of 2
):
    """Loss of a pair of truncated rows, and its gradient w.r.t. the student's logits.

    One program a pair, which holds all of its buckets.  ``compare_entries`` in
    ``kernels/entries.py`` launches it.
    """
    row = tl.program_id(0).to(tl.int64)
    place = tl.arange(0, BUCKETS)
    log_s, lse_s = load_buckets(student_ptr, student_rest_ptr, row, place, num_entries)
    log_t, lse_t = load_buckets(teacher_ptr, teacher_rest_ptr, row, place, num_entries)
    term, dlog_s, cut = clipped_term(log_s, log_t, parameter, balance, clip, DIVERGENCE)
    dlogits = dlog_s - exp(log_s) * tl.sum(dlog_s, axis=0)
    tl.store(loss_ptr + row, tl.sum(term, axis=0))
    if clipped_ptr is not None:
        tl.store(clipped_ptr + row, tl.sum(cut, axis=0))
    tl.store(inside_ptr + row * num_entries + place, dlogits, mask=place < num_entries)
    if student_rest_ptr is not None:
        rest = tl.load(student_rest_ptr + row)
        tl.store(outside_ptr + row, tl.sum(tl.where(place == num_entries, dlogits, 0.0), axis=0))
        tl.store(background_ptr + row, tl.where(rest == -float("inf"), 0.0, rest))
        tl.store(student_lse_ptr + row, lse_s)
        tl.store(teacher_lse_ptr + row, lse_t)
