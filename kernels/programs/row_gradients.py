"""Triton programs that turn whole rows of logits into losses and gradients w.r.t. the logits.

They read rows whose normalisers are known already, one program a row, in the blocks and lanes of
``rows.py``.

The gradient of a divergence is ``dlogit_v = dlog_s_v - s_v * total`` with ``total`` the sum of
``dlog_s`` over the row, so ``total`` must be known before the first entry is written:

* For a KL ``total`` is a known share of the mean log-ratio in the row's state (the divergence's
  ``share_of_mean_ratio``).  ``divergence_gradient`` then finds loss and gradient in one read.
* For any other divergence, or under an entry clip, ``divergence`` reads the rows first and finds
  the loss and ``total``, and ``divergence_gradient`` reads them again.

Whichever program sums the loss also sums the metrics that are named (``ROW_METRICS``).

Dimension key:  C rows in a chunk, W columns
"""

import triton
import triton.language as tl

from fused_sd.kernels.divergence import exp
from fused_sd.kernels.programs.rows import (
    add_metrics,
    block_range,
    load_log_probs,
    load_logits,
    load_state,
    no_metrics,
    store_metrics,
)


@triton.jit
def clipped_term(log_s, log_t, parameter, balance, clip, DIVERGENCE: tl.constexpr):
    """A block of a divergence's terms, as ``DivergenceTerm.clipped`` explains them.

    Returns:
        term: the balanced term, cut where the plain term is above ``clip`` (if not None).
        dlog_s: derivative of the term w.r.t. the student's log-probability.
        cut: 1.0 where the term was cut, else 0.0.
    """
    term, dlog_s = DIVERGENCE(log_s, log_t, parameter)
    cut = tl.zeros_like(term)
    if clip is not None:
        s = exp(log_s)
        shift = balance * (s - exp(log_t))
        above = term + shift > clip
        cut = tl.where(above, 1.0, 0.0)
        dlog_s = tl.where(above, -balance * s, dlog_s)
        term = tl.where(above, clip - shift, term)
    return term, dlog_s, cut


@triton.jit
def store_gradient(
    out_ptr,
    offs_v,
    num_columns,
    is_tail: tl.constexpr,
    dlogits,
    logits,
    inverse_cap,
    IN_PLACE: tl.constexpr,
):
    """Store a block of a row's gradient, rounded to the dtype of ``out_ptr``.

    A soft-cap's derivative is applied first: ``logits`` are capped, and the gradient is w.r.t. the
    logits before the cap.  In place, a thread may store to columns that another thread loads, so
    all of them must have loaded the block before any of them stores.
    """
    if inverse_cap is not None:
        share = logits * inverse_cap
        dlogits = tl.where(logits == -float("inf"), 0.0, dlogits * (1 - share * share))
    if IN_PLACE:
        tl.debug_barrier()
    dlogits = dlogits.to(out_ptr.dtype.element_ty)
    if is_tail:
        tl.store(out_ptr + offs_v, dlogits, mask=offs_v < num_columns)
    else:
        tl.store(out_ptr + offs_v, dlogits)


@triton.jit
def divergence(
    student_ptr,  # (C, W) fp32 logits, unit stride in the columns
    teacher_ptr,  # (C, W) fp32 logits, unit stride in the columns
    student_stride,  # elements from one row of the student's logits to the next
    teacher_stride,  # elements from one row of the teacher's logits to the next
    num_columns,  # W
    state_ptr,  # (C, STATE) fp32, contiguous, as normalizers wrote it
    loss_ptr,  # (C,) fp32, written: sum of the terms
    total_ptr,  # (C,) fp32 or None, written: sum of the terms' derivatives w.r.t. log s
    clipped_ptr,  # (C,) fp32 or None, written: number of entries that were cut
    parameter,  # what the divergence takes, by program_arguments in kernels/divergence.py
    balance,  # float, DivergenceTerm.balance: plain term = balanced term + balance * (s - t)
    clip,  # float or None, largest plain term
    metric_ptrs,  # (C,) fp32 or None for each of ROW_METRICS, written: further sums
    jsd_parameter,  # moderate_jsd's parameter for that metric, or None without it
    DIVERGENCE: tl.constexpr,  # function of kernels/divergence.py, inlined
    STATE: tl.constexpr,  # elements from one pair's state to the next
    BLOCK_V: tl.constexpr,  # columns that are read at a time
):
    """Loss of a pair of rows and what a gradient needs of the whole row; reads both rows once.

    One program a pair.  ``divergence_`` in ``kernels/rows.py`` launches it where there is no
    gradient to write, and before ``divergence_gradient`` where that needs ``total``.  It is a
    program of its own because ``total`` is a sum over the row, over all ranks' columns if the
    vocabulary lies on several, that is needed before the first entry of the gradient.
    """
    row = tl.program_id(0).to(tl.int64)
    student_ptr += row * student_stride
    teacher_ptr += row * teacher_stride
    anchor_s, log_scale_s, anchor_t, log_scale_t, _ = load_state(state_ptr + row * STATE)
    loss = tl.zeros([BLOCK_V], tl.float32)
    total = tl.zeros([BLOCK_V], tl.float32)
    clipped = tl.zeros([BLOCK_V], tl.float32)
    sums = no_metrics(BLOCK_V)
    for is_tail in tl.static_range(2):
        begin, end = block_range(num_columns, is_tail, BLOCK_V)
        for start in range(begin, end, BLOCK_V):
            offs_v = start + tl.arange(0, BLOCK_V)
            log_s = load_log_probs(student_ptr, offs_v, num_columns, is_tail, anchor_s, log_scale_s)
            log_t = load_log_probs(teacher_ptr, offs_v, num_columns, is_tail, anchor_t, log_scale_t)
            term, dlog_s, cut = clipped_term(log_s, log_t, parameter, balance, clip, DIVERGENCE)
            loss += term
            total += dlog_s
            clipped += cut
            sums = add_metrics(sums, log_s, log_t, metric_ptrs, jsd_parameter)
    tl.store(loss_ptr + row, tl.sum(loss, axis=0))
    if total_ptr is not None:
        tl.store(total_ptr + row, tl.sum(total, axis=0))
    if clipped_ptr is not None:
        tl.store(clipped_ptr + row, tl.sum(clipped, axis=0))
    store_metrics(sums, metric_ptrs, row)


@triton.jit
def divergence_gradient(
    student_ptr,  # (C, W) fp32 logits, unit stride in the columns
    teacher_ptr,  # (C, W) fp32 logits, unit stride in the columns
    student_stride,  # elements from one row of the student's logits to the next
    teacher_stride,  # elements from one row of the teacher's logits to the next
    num_columns,  # W
    state_ptr,  # (C, STATE) fp32, contiguous, as normalizers wrote it
    loss_ptr,  # (C,) fp32, written where total_ptr is None: sum of the terms
    total_ptr,  # (C,) fp32 or None, sum of the terms' derivatives w.r.t. log s
    row_weights_ptr,  # (C,) fp32 factors of the rows' gradients
    out_ptr,  # (C, W) fp32, bf16 or fp16, written: gradient of sum(row_weights * loss)
    out_stride,  # elements from one row of the gradient to the next
    parameter,  # what the divergence takes, by program_arguments in kernels/divergence.py
    balance,  # float, DivergenceTerm.balance: plain term = balanced term + balance * (s - t)
    clip,  # float or None, largest plain term
    share_of_mean_ratio,  # float or None: total / mean log-ratio, where total_ptr is None
    inverse_cap,  # float or None, 1 / soft-cap of the student's logits
    metric_ptrs,  # (C,) fp32 or None for each of ROW_METRICS, written: further sums
    jsd_parameter,  # moderate_jsd's parameter for that metric, or None without it
    DIVERGENCE: tl.constexpr,  # function of kernels/divergence.py, inlined
    IN_PLACE: tl.constexpr,  # bool: out may be the student's logits themselves
    STATE: tl.constexpr,  # elements from one pair's state to the next
    BLOCK_V: tl.constexpr,  # columns that are read at a time
):
    """Gradient of a divergence w.r.t. the student's logits; reads both rows once.

    One program a pair.  ``divergence_`` in ``kernels/rows.py`` launches it where rows have weights.
    Where ``total`` is given, ``divergence`` has found the loss too; else this program finds it, so
    that a KL is read once for loss and gradient.
    """
    row = tl.program_id(0).to(tl.int64)
    student_ptr += row * student_stride
    teacher_ptr += row * teacher_stride
    out_ptr += row * out_stride
    anchor_s, log_scale_s, anchor_t, log_scale_t, mean_ratio = load_state(state_ptr + row * STATE)
    row_weight = tl.load(row_weights_ptr + row)
    if total_ptr is not None:
        total = tl.load(total_ptr + row)
    else:
        total = share_of_mean_ratio * mean_ratio
    loss = tl.zeros([BLOCK_V], tl.float32)
    sums = no_metrics(BLOCK_V)
    for is_tail in tl.static_range(2):
        begin, end = block_range(num_columns, is_tail, BLOCK_V)
        for start in range(begin, end, BLOCK_V):
            offs_v = start + tl.arange(0, BLOCK_V)
            z = load_logits(student_ptr, offs_v, num_columns, is_tail)
            log_s = (z - anchor_s) - log_scale_s
            log_t = load_log_probs(teacher_ptr, offs_v, num_columns, is_tail, anchor_t, log_scale_t)
            term, dlog_s, _ = clipped_term(log_s, log_t, parameter, balance, clip, DIVERGENCE)
            loss += term
            sums = add_metrics(sums, log_s, log_t, metric_ptrs, jsd_parameter)
            dlogits = (dlog_s - exp(log_s) * total) * row_weight
            # a row of weight 0 may have an infinite loss, as a token that was cut does
            dlogits = tl.where(row_weight == 0, 0.0, dlogits)  # 0 * inf is NaN
            store_gradient(out_ptr, offs_v, num_columns, is_tail, dlogits, z, inverse_cap, IN_PLACE)
    if total_ptr is None:
        tl.store(loss_ptr + row, tl.sum(loss, axis=0))
    store_metrics(sums, metric_ptrs, row)


@triton.jit
def softmax_gradient(
    logits_ptr,  # (C, W) fp32, unit stride in the columns
    stride,  # elements from one row of the logits to the next
    num_columns,  # W
    normalizer_ptr,  # (C,) fp64 log-sum-exp that makes the logits log-probabilities
    constant_ptr,  # (C,) fp32
    slope_ptr,  # (C,) fp32 or None: 0
    out_ptr,  # (C, W) fp32, bf16 or fp16, written: p * (constant + slope * log p)
    out_stride,  # elements from one row of the gradient to the next
    inverse_cap,  # float or None, 1 / soft-cap of the logits
    row_weights_ptr,  # (C,) fp32 or None, factors of the rows' gradients; not with a slope
    columns_ptr,  # (C, K) int64 in [0, W) or None, contiguous: columns with values of their own
    values_ptr,  # (C, K) fp32, contiguous: gradient there, before the weights and the cap
    entries_ptr,  # (C, K) fp32, contiguous: logits there; read with a cap
    num_entries,  # K
    IN_PLACE: tl.constexpr,  # bool: out may be the logits themselves
    ENTRIES: tl.constexpr,  # K or the next power of 2
    BLOCK_V: tl.constexpr,  # columns that are read at a time
):
    """A softmax times a line in its logarithm, written as a row's gradient; reads the row once.

    One program a row.  ``softmax_gradient_`` in ``kernels/rows.py`` launches it for every loss of
    chosen entries: log-probabilities, cross entropies, policy losses and truncated supports have
    this gradient in all other columns, and values of their own in the chosen ones.  The slope is an
    entropy's.
    """
    row = tl.program_id(0).to(tl.int64)
    exact, constant = tl.load(normalizer_ptr + row), tl.load(constant_ptr + row)
    # the row's numbers make up for the part of the normaliser that fp32 loses
    normalizer = exact.to(tl.float32)
    rest = (exact - normalizer).to(tl.float32)
    share = exp(-rest)
    if row_weights_ptr is not None:
        row_weight = tl.load(row_weights_ptr + row)
        constant = tl.where(row_weight == 0, 0.0, constant * row_weight)
    if slope_ptr is not None:
        slope = tl.load(slope_ptr + row)
        constant -= slope * rest
        slope *= share
    constant *= share
    for is_tail in tl.static_range(2):
        begin, end = block_range(num_columns, is_tail, BLOCK_V)
        for start in range(begin, end, BLOCK_V):
            offs_v = start + tl.arange(0, BLOCK_V)
            z = load_logits(logits_ptr + row * stride, offs_v, num_columns, is_tail)
            prob = exp(z - normalizer)
            factor = constant
            if slope_ptr is not None:
                factor += slope * tl.where(prob == 0, 0.0, z - normalizer)
            dlogits = prob * factor
            to = out_ptr + row * out_stride
            store_gradient(to, offs_v, num_columns, is_tail, dlogits, z, inverse_cap, IN_PLACE)
    if columns_ptr is not None:
        place = tl.arange(0, ENTRIES)
        exists, at = place < num_entries, row * num_entries + place
        values = tl.load(values_ptr + at, mask=exists, other=0.0)
        if row_weights_ptr is not None:
            values = tl.where(row_weight == 0, 0.0, values * row_weight)
        if inverse_cap is not None:
            share = tl.load(entries_ptr + at, mask=exists, other=0.0) * inverse_cap
            values = tl.where(values == 0, 0.0, values * (1 - share * share))
        to = out_ptr + row * out_stride + tl.load(columns_ptr + at, mask=exists, other=0)
        tl.debug_barrier()  # other threads have written these columns
        tl.store(to, values.to(out_ptr.dtype.element_ty), mask=exists)
