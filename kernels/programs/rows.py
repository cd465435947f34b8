"""Triton programs that measure whole rows of logits: normalisers, entropies and metrics.

A program handles one row (its ``program_id``) and loops over the row's fp32 logits in blocks of
``BLOCK_V`` columns: over all whole blocks and then, in a copy of the loop that masks what it reads,
over the tail of the row.  It keeps one partial sum for each of the ``BLOCK_V`` lanes and adds the
lanes up once, after the loop, so that no thread waits for another inside the loop.

``normalizers`` reads the student's row and the teacher's row together and leaves five numbers, the
*state* of the pair, for the programs that read the same rows after it:

    0  largest logit of the student, its *anchor*
    1  log of the sum of ``exp(z - anchor)`` over the student's row, its *log_scale*
    2  anchor of the teacher
    3  log_scale of the teacher
    4  the student's mean log-ratio, ``sum of s (log s - log t)``

A log-sum-exp is kept in two parts because ``(z - anchor) - log_scale`` keeps the digits that
``z - lse`` loses: the difference of two close logits is exact, and log_scale is small.  The mean
log-ratio is what a gradient of a KL subtracts (``row_gradients.py``); without it, the row would
have to be read once more to find it.

Dimension key:  C rows in a chunk, W columns
"""

import triton
import triton.language as tl

from fused_sd.kernels.divergence import exp, forward_kl, moderate_jsd, reverse_kl

LOWEST = tl.constexpr(-3e38)  # finite, and below every logit but -inf


@triton.jit
def block_range(num_columns, is_tail: tl.constexpr, BLOCK_V: tl.constexpr):
    """The first column of a row's whole blocks, or of its tail, and the first one behind them."""
    tail = num_columns // BLOCK_V * BLOCK_V
    if is_tail:
        return tail, num_columns
    else:
        return 0, tail


@triton.jit
def load_logits(row_ptr, offs_v, num_columns, is_tail: tl.constexpr = True):
    """Load a block of a row's logits, fp32, with -inf (no mass) in columns behind the row's end.

    Only a row's tail may reach behind its end; a block that is known to be whole is not masked.
    """
    if not is_tail:
        return tl.load(row_ptr + offs_v)
    return tl.load(row_ptr + offs_v, mask=offs_v < num_columns, other=-float("inf"))


@triton.jit
def load_log_probs(row_ptr, offs_v, num_columns, is_tail: tl.constexpr, anchor, log_scale):
    """Load a block of a row's logits as log-probabilities, from the row's anchor and log_scale."""
    return (load_logits(row_ptr, offs_v, num_columns, is_tail) - anchor) - log_scale


@triton.jit
def load_state(state_ptr):
    """Load a pair's anchor_s, log_scale_s, anchor_t, log_scale_t and mean log-ratio."""
    anchor_s, log_scale_s = tl.load(state_ptr), tl.load(state_ptr + 1)
    anchor_t, log_scale_t = tl.load(state_ptr + 2), tl.load(state_ptr + 3)
    return anchor_s, log_scale_s, anchor_t, log_scale_t, tl.load(state_ptr + 4)


@triton.jit
def online_lse_step(z, anchor):
    """Take a block of logits into a log-sum-exp that runs in every lane.

    A lane's sum of weights ``exp(z - anchor)`` becomes ``decay * sum + weight``.  One of the two
    factors is always 1, so that a logit costs one exponential.

    Returns:
        anchor: each lane's largest logit so far, with this block.
        decay: factor of what the lane has summed relative to its previous anchor.
        weight: ``exp(z - anchor)`` of this block relative to the new anchor.
    """
    is_larger = z > anchor
    ratio = exp(-tl.abs(z - anchor))  # 0 where z is -inf, because an anchor is finite
    decay, weight = tl.where(is_larger, ratio, 1.0), tl.where(is_larger, 1.0, ratio)
    return tl.where(is_larger, z, anchor), decay, weight


@triton.jit
def no_metrics(BLOCK_V: tl.constexpr):
    """Sums of the five metrics of ``ROW_METRICS`` before the first block, one of them a lane."""
    zeros = tl.zeros([BLOCK_V], tl.float32)
    return zeros, zeros, zeros, zeros, zeros


@triton.jit
def add_metrics(sums, log_s, log_t, metric_ptrs, jsd_parameter):
    """Add a block's terms to the sums of those metrics that have a place in ``metric_ptrs``.

    A sum that is not wanted stays a constant, which the compiler removes from the caller's loop;
    what the caller has computed of the same log-probabilities is not computed again.
    """
    forward, reverse, mixture, entropy_s, entropy_t = sums
    if metric_ptrs[0] is not None:
        forward += forward_kl(log_s, log_t, 0.0)[0]
    if metric_ptrs[1] is not None:
        reverse += reverse_kl(log_s, log_t, 0.0)[0]
    if metric_ptrs[2] is not None:
        mixture += moderate_jsd(log_s, log_t, jsd_parameter)[0]
    if metric_ptrs[3] is not None:
        entropy_s -= exp(log_s) * tl.maximum(log_s, LOWEST)  # the logarithm of 0 is made finite
    if metric_ptrs[4] is not None:
        entropy_t -= exp(log_t) * tl.maximum(log_t, LOWEST)
    return forward, reverse, mixture, entropy_s, entropy_t


@triton.jit
def store_metrics(sums, metric_ptrs, row):
    """Store a row's metrics, each where it has a place."""
    for i in tl.static_range(5):
        if metric_ptrs[i] is not None:
            tl.store(metric_ptrs[i] + row, tl.sum(sums[i], axis=0))


@triton.jit
def log_normalizer(
    logits_ptr,  # (C, W) fp32, unit stride in the columns
    stride,  # elements from one row of the logits to the next
    num_columns,  # W
    lse_ptr,  # (C,) fp64, written: log-sum-exp of each row
    entropy_ptr,  # (C,) fp32 or None, written: entropy of each row in nats
    BLOCK_V: tl.constexpr,  # columns that are read at a time
):
    """Log-sum-exp of a row of one side and, if wanted, its entropy; reads the row once.

    One program a row.  ``log_normalizer`` and ``lse_and_entropy`` in ``kernels/rows.py`` launch it
    for losses of sampled tokens and for truncated supports, which need no pair of rows.
    """
    row = tl.program_id(0).to(tl.int64)
    anchor = tl.full([BLOCK_V], LOWEST, tl.float32)
    scale = tl.zeros([BLOCK_V], tl.float32)
    weighted = tl.zeros([BLOCK_V], tl.float32)  # sum of exp(z - anchor) (z - anchor)
    for is_tail in tl.static_range(2):
        begin, end = block_range(num_columns, is_tail, BLOCK_V)
        for start in range(begin, end, BLOCK_V):
            offs_v = start + tl.arange(0, BLOCK_V)
            z = load_logits(logits_ptr + row * stride, offs_v, num_columns, is_tail)
            before = anchor
            anchor, decay, weight = online_lse_step(z, before)
            if entropy_ptr is not None:
                step = tl.where(scale == 0, 0.0, before - anchor)
                gap = tl.where(weight == 0, 0.0, z - anchor)
                weighted = decay * (weighted + scale * step) + weight * gap
            scale = decay * scale + weight
    top = tl.max(anchor, axis=0)
    decay = exp(anchor - top)
    total = tl.sum(scale * decay, axis=0)
    tl.store(lse_ptr + row, top.to(tl.float64) + tl.log(total))
    if entropy_ptr is not None:
        step = tl.where(scale == 0, 0.0, anchor - top)
        below = tl.sum(decay * (weighted + scale * step), axis=0)
        tl.store(entropy_ptr + row, tl.log(total) - below / total)


@triton.jit
def normalizers(
    student_ptr,  # (C, W) fp32 logits, unit stride in the columns
    teacher_ptr,  # (C, W) fp32 logits, unit stride in the columns
    student_stride,  # elements from one row of the student's logits to the next
    teacher_stride,  # elements from one row of the teacher's logits to the next
    num_columns,  # W
    state_ptr,  # (C, STATE) fp32, contiguous; the first 5 of each row are written
    student_lse_ptr,  # (C,) fp64, written: log-sum-exp of each of the student's rows
    teacher_lse_ptr,  # (C,) fp64, written: log-sum-exp of each of the teacher's rows
    largest_ptr,  # (C, 2) int64 or None, contiguous, written: columns of both sides' largest logits
    STATE: tl.constexpr,  # elements from one pair's state to the next
    BLOCK_V: tl.constexpr,  # columns that are read at a time
):
    """State of a pair of rows, as the module's docstring lists it; reads both rows once.

    One program a pair.  ``normalizers`` in ``kernels/rows.py`` launches it before any program that
    compares the sides.  It is a program of its own because a gradient needs the normalisers of
    whole rows before its first entry, and other ranks' columns are joined in between.
    """
    row = tl.program_id(0).to(tl.int64)
    anchor_s = tl.full([BLOCK_V], LOWEST, tl.float32)
    anchor_t = tl.full([BLOCK_V], LOWEST, tl.float32)
    scale_s = tl.zeros([BLOCK_V], tl.float32)
    scale_t = tl.zeros([BLOCK_V], tl.float32)
    weighted = tl.zeros([BLOCK_V], tl.float32)  # sum of exp(z_s - anchor_s) (z_s - z_t)
    largest_s = tl.zeros([BLOCK_V], tl.int32)  # columns of the anchors
    largest_t = tl.zeros([BLOCK_V], tl.int32)
    for is_tail in tl.static_range(2):
        begin, end = block_range(num_columns, is_tail, BLOCK_V)
        for start in range(begin, end, BLOCK_V):
            offs_v = start + tl.arange(0, BLOCK_V)
            z_s = load_logits(student_ptr + row * student_stride, offs_v, num_columns, is_tail)
            z_t = load_logits(teacher_ptr + row * teacher_stride, offs_v, num_columns, is_tail)
            if largest_ptr is not None:
                largest_s = tl.where(z_s > anchor_s, offs_v, largest_s)
                largest_t = tl.where(z_t > anchor_t, offs_v, largest_t)
            anchor_s, decay, weight = online_lse_step(z_s, anchor_s)
            scale_s = decay * scale_s + weight
            weighted = decay * weighted + tl.where(weight == 0, 0.0, weight * (z_s - z_t))
            anchor_t, decay, weight = online_lse_step(z_t, anchor_t)
            scale_t = decay * scale_t + weight
    top_s, top_t = tl.max(anchor_s, axis=0), tl.max(anchor_t, axis=0)
    decay = exp(anchor_s - top_s)
    total_s = tl.sum(scale_s * decay, axis=0)
    mean = tl.sum(tl.where(decay == 0, 0.0, weighted * decay), axis=0) / total_s
    log_scale_s = tl.log(total_s)
    log_scale_t = tl.log(tl.sum(scale_t * exp(anchor_t - top_t), axis=0))
    tl.store(student_lse_ptr + row, top_s.to(tl.float64) + log_scale_s)
    tl.store(teacher_lse_ptr + row, top_t.to(tl.float64) + log_scale_t)
    if largest_ptr is not None:  # of equal logits the first column, in a lane and among lanes
        first_s = tl.min(tl.where(anchor_s == top_s, largest_s, num_columns), axis=0)
        first_t = tl.min(tl.where(anchor_t == top_t, largest_t, num_columns), axis=0)
        tl.store(largest_ptr + 2 * row, first_s.to(tl.int64))
        tl.store(largest_ptr + 2 * row + 1, first_t.to(tl.int64))
    state_ptr += row * STATE
    tl.store(state_ptr, top_s)
    tl.store(state_ptr + 1, log_scale_s)
    tl.store(state_ptr + 2, top_t)
    tl.store(state_ptr + 3, log_scale_t)
    tl.store(state_ptr + 4, mean - ((top_s - top_t) + (log_scale_s - log_scale_t)))


@triton.jit
def row_metrics(
    student_ptr,  # (C, W) fp32 logits, unit stride in the columns
    teacher_ptr,  # (C, W) fp32 logits, unit stride in the columns
    student_stride,  # elements from one row of the student's logits to the next
    teacher_stride,  # elements from one row of the teacher's logits to the next
    num_columns,  # W
    state_ptr,  # (C, STATE) fp32, contiguous, as normalizers wrote it
    metric_ptrs,  # (C,) fp32 or None for each of ROW_METRICS, written: the metrics that are named
    jsd_parameter,  # moderate_jsd's parameter for that metric, or None without it
    STATE: tl.constexpr,  # elements from one pair's state to the next
    BLOCK_V: tl.constexpr,  # columns that are read at a time
):
    """Those that are named of both KLs, the JSD and both entropies of a pair of rows; one read.

    One program a pair.  ``row_metrics`` in ``kernels/rows.py`` launches it for a loss that does not
    sum whole rows: that of a truncated support.  Where a loss does, its own pass adds the metrics
    up (``row_gradients.py``).
    """
    row = tl.program_id(0).to(tl.int64)
    student_ptr += row * student_stride
    teacher_ptr += row * teacher_stride
    anchor_s, log_scale_s, anchor_t, log_scale_t, _ = load_state(state_ptr + row * STATE)
    sums = no_metrics(BLOCK_V)
    for is_tail in tl.static_range(2):
        begin, end = block_range(num_columns, is_tail, BLOCK_V)
        for start in range(begin, end, BLOCK_V):
            offs_v = start + tl.arange(0, BLOCK_V)
            log_s = load_log_probs(student_ptr, offs_v, num_columns, is_tail, anchor_s, log_scale_s)
            log_t = load_log_probs(teacher_ptr, offs_v, num_columns, is_tail, anchor_t, log_scale_t)
            sums = add_metrics(sums, log_s, log_t, metric_ptrs, jsd_parameter)
    store_metrics(sums, metric_ptrs, row)
