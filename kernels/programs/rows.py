"""Triton programs that measure whole rows of logits: normalisers, entropies and metrics.

A program handles one row (its ``program_id``) and loops over the row's fp32 logits in blocks of
``BLOCK_V`` columns.  It keeps one partial sum for each of the ``BLOCK_V`` lanes and adds the lanes
up once, after the loop, so that no thread waits for another inside the loop.

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

from fused_sd.kernels.divergence import forward_kl, jsd, reverse_kl

LOWEST = tl.constexpr(-3e38)  # finite, and below every logit but -inf


@triton.jit
def load_logits(row_ptr, offs_v, num_columns):
    """Load a block of a row's logits, fp32, with -inf (no mass) in columns behind the row's end."""
    return tl.load(row_ptr + offs_v, mask=offs_v < num_columns, other=-float("inf"))


@triton.jit
def load_log_probs(row_ptr, offs_v, num_columns, anchor, log_scale):
    """Load a block of a row's logits as log-probabilities, from the row's anchor and log_scale."""
    return (load_logits(row_ptr, offs_v, num_columns) - anchor) - log_scale


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
    ratio = tl.exp(-tl.abs(z - anchor))  # 0 where z is -inf, because an anchor is finite
    decay, weight = tl.where(is_larger, ratio, 1.0), tl.where(is_larger, 1.0, ratio)
    return tl.where(is_larger, z, anchor), decay, weight


@triton.jit
def entropy_term(log_prob):
    """``-p log p`` of each log-probability, 0 where p is 0."""
    prob = tl.exp(log_prob)
    return tl.where(prob == 0, 0.0, -prob * log_prob)


@triton.jit
def log_normalizer(
    logits_ptr,  # (C, W) fp32, unit stride in the columns
    stride,  # elements from one row of the logits to the next
    num_columns,  # W
    lse_ptr,  # (C,) fp32, written: log-sum-exp of each row
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
    for start in range(0, num_columns, BLOCK_V):
        offs_v = start + tl.arange(0, BLOCK_V)
        z = load_logits(logits_ptr + row * stride, offs_v, num_columns)
        before = anchor
        anchor, decay, weight = online_lse_step(z, before)
        if entropy_ptr is not None:
            step = tl.where(scale == 0, 0.0, before - anchor)
            gap = tl.where(weight == 0, 0.0, z - anchor)
            weighted = decay * (weighted + scale * step) + weight * gap
        scale = decay * scale + weight
    top = tl.max(anchor, axis=0)
    decay = tl.exp(anchor - top)
    total = tl.sum(scale * decay, axis=0)
    tl.store(lse_ptr + row, top + tl.log(total))
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
    for start in range(0, num_columns, BLOCK_V):
        offs_v = start + tl.arange(0, BLOCK_V)
        z_s = load_logits(student_ptr + row * student_stride, offs_v, num_columns)
        z_t = load_logits(teacher_ptr + row * teacher_stride, offs_v, num_columns)
        anchor_s, decay, weight = online_lse_step(z_s, anchor_s)
        scale_s = decay * scale_s + weight
        weighted = decay * weighted + tl.where(weight == 0, 0.0, weight * (z_s - z_t))
        anchor_t, decay, weight = online_lse_step(z_t, anchor_t)
        scale_t = decay * scale_t + weight
    top_s, top_t = tl.max(anchor_s, axis=0), tl.max(anchor_t, axis=0)
    decay = tl.exp(anchor_s - top_s)
    total_s = tl.sum(scale_s * decay, axis=0)
    mean = tl.sum(tl.where(decay == 0, 0.0, weighted * decay), axis=0) / total_s
    log_scale_s = tl.log(total_s)
    log_scale_t = tl.log(tl.sum(scale_t * tl.exp(anchor_t - top_t), axis=0))
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
    out_ptr,  # (5, C) fp32, written: a row for each of ROW_METRICS, in its order
    out_stride,  # elements from one metric's row to the next
    STATE: tl.constexpr,  # elements from one pair's state to the next
    BLOCK_V: tl.constexpr,  # columns that are read at a time
):
    """Forward KL, reverse KL, JSD and both entropies of a pair of rows; reads both rows once.

    One program a pair.  ``row_metrics`` in ``kernels/rows.py`` launches it, only when a caller asks
    for such metrics.  It is a program of its own so that a loss without metrics does not pay for
    their exponentials, and it finds all five because the reads cost more than the sums.
    """
    row = tl.program_id(0).to(tl.int64)
    student_ptr += row * student_stride
    teacher_ptr += row * teacher_stride
    anchor_s, log_scale_s, anchor_t, log_scale_t, _ = load_state(state_ptr + row * STATE)
    forward = tl.zeros([BLOCK_V], tl.float32)
    reverse = tl.zeros([BLOCK_V], tl.float32)
    mixture = tl.zeros([BLOCK_V], tl.float32)
    entropy_s = tl.zeros([BLOCK_V], tl.float32)
    entropy_t = tl.zeros([BLOCK_V], tl.float32)
    for start in range(0, num_columns, BLOCK_V):
        offs_v = start + tl.arange(0, BLOCK_V)
        log_s = load_log_probs(student_ptr, offs_v, num_columns, anchor_s, log_scale_s)
        log_t = load_log_probs(teacher_ptr, offs_v, num_columns, anchor_t, log_scale_t)
        forward += forward_kl(log_s, log_t, 0.0)[0]
        reverse += reverse_kl(log_s, log_t, 0.0)[0]
        mixture += jsd(log_s, log_t, 0.5)[0]
        entropy_s += entropy_term(log_s)
        entropy_t += entropy_term(log_t)
    tl.store(out_ptr + row, tl.sum(forward, axis=0))
    tl.store(out_ptr + out_stride + row, tl.sum(reverse, axis=0))
    tl.store(out_ptr + 2 * out_stride + row, tl.sum(mixture, axis=0))
    tl.store(out_ptr + 3 * out_stride + row, tl.sum(entropy_s, axis=0))
    tl.store(out_ptr + 4 * out_stride + row, tl.sum(entropy_t, axis=0))
