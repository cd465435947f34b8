"""The programs behind the row functions: each walks one row of fp32 logits in blocks of columns.

Sums over a row are kept lane by lane and reduced once, at its end: no thread waits for another
inside the loop.

What is known of a pair of rows lies in ``STATE`` numbers: of each side the largest logit (*anchor*)
and the logarithm of what the others add to it, whose sum is the log-sum-exp, and the student's mean
log-ratio.  ``(z - anchor) - log_scale`` keeps the digits that ``z - lse`` would lose.
"""

import triton
import triton.language as tl

from fused_sd.kernels.divergence import forward_kl, jsd, reverse_kl

LOWEST = tl.constexpr(-3e38)  # below every logit but -inf, and finite


@triton.jit
def load(row_ptr, offs_v, num_columns):
    return tl.load(row_ptr + offs_v, mask=offs_v < num_columns, other=-float("inf"))


@triton.jit
def clipped_term(
    log_s, log_t, parameter, balance, clip, DIVERGENCE: tl.constexpr, HAS_CLIP: tl.constexpr
):
    """The balanced term and, under an entry clip, 1 where the plain one is cut.

    The cut entries carry the shift between the two, as ``DivergenceTerm.clipped`` explains.
    """
    term, dlog_s = DIVERGENCE(log_s, log_t, parameter)
    cut = tl.zeros_like(term)
    if HAS_CLIP:
        s = tl.exp(log_s)
        shift = balance * (s - tl.exp(log_t))
        above = term + shift > clip
        cut = tl.where(above, 1.0, 0.0)
        dlog_s = tl.where(above, -balance * s, dlog_s)
        term = tl.where(above, clip - shift, term)
    return term, dlog_s, cut


@triton.jit
def observe(z, anchor):
    """Online log-sum-exp, one exponential for each logit.

    Returns:
        anchor: the largest logit of each lane, now.
        fade: by which what was summed before shrinks.
        share: the weight of ``z`` among what is summed.
    """
    is_larger = z > anchor
    decay = tl.exp(-tl.abs(z - anchor))  # 0 for -inf, since no anchor is
    fade, share = tl.where(is_larger, decay, 1.0), tl.where(is_larger, 1.0, decay)
    return tl.where(is_larger, z, anchor), fade, share


@triton.jit
def log_normalizer(
    logits_ptr,
    stride,
    num_columns,
    lse_ptr,
    entropy_ptr,
    HAS_ENTROPY: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    anchor = tl.full([BLOCK_V], LOWEST, tl.float32)
    scale = tl.zeros([BLOCK_V], tl.float32)
    weighted = tl.zeros([BLOCK_V], tl.float32)  # sum of exp(z - anchor) (z - anchor)
    for start in range(0, num_columns, BLOCK_V):
        offs_v = start + tl.arange(0, BLOCK_V)
        z = load(logits_ptr + row * stride, offs_v, num_columns)
        before = anchor
        anchor, fade, share = observe(z, before)
        if HAS_ENTROPY:
            step = tl.where(scale == 0, 0.0, before - anchor)
            gap = tl.where(share == 0, 0.0, z - anchor)
            weighted = fade * (weighted + scale * step) + share * gap
        scale = fade * scale + share
    top = tl.max(anchor, axis=0)
    decay = tl.exp(anchor - top)
    total = tl.sum(scale * decay, axis=0)
    tl.store(lse_ptr + row, top + tl.log(total))
    if HAS_ENTROPY:
        step = tl.where(scale == 0, 0.0, anchor - top)
        below = tl.sum(decay * (weighted + scale * step), axis=0)
        tl.store(entropy_ptr + row, tl.log(total) - below / total)


@triton.jit
def normalizers(
    student_ptr,
    teacher_ptr,
    student_stride,
    teacher_stride,
    num_columns,
    state_ptr,
    STATE: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    anchor_s = tl.full([BLOCK_V], LOWEST, tl.float32)
    anchor_t = tl.full([BLOCK_V], LOWEST, tl.float32)
    scale_s = tl.zeros([BLOCK_V], tl.float32)
    scale_t = tl.zeros([BLOCK_V], tl.float32)
    weighted = tl.zeros([BLOCK_V], tl.float32)  # sum of exp(z_s - anchor_s) (z_s - z_t)
    for start in range(0, num_columns, BLOCK_V):
        offs_v = start + tl.arange(0, BLOCK_V)
        z_s = load(student_ptr + row * student_stride, offs_v, num_columns)
        z_t = load(teacher_ptr + row * teacher_stride, offs_v, num_columns)
        anchor_s, fade, share = observe(z_s, anchor_s)
        scale_s = fade * scale_s + share
        weighted = fade * weighted + tl.where(share == 0, 0.0, share * (z_s - z_t))
        anchor_t, fade, share = observe(z_t, anchor_t)
        scale_t = fade * scale_t + share
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
def known_of(state_ptr):
    """What ``normalizers`` found of a pair of rows."""
    anchor_s, log_scale_s = tl.load(state_ptr), tl.load(state_ptr + 1)
    anchor_t, log_scale_t = tl.load(state_ptr + 2), tl.load(state_ptr + 3)
    return anchor_s, log_scale_s, anchor_t, log_scale_t, tl.load(state_ptr + 4)


@triton.jit
def log_probs(logits_ptr, offs_v, num_columns, anchor, log_scale):
    return (load(logits_ptr, offs_v, num_columns) - anchor) - log_scale


@triton.jit
def entropy_term(log_prob):
    share = tl.exp(log_prob)
    return tl.where(share == 0, 0.0, -share * log_prob)


@triton.jit
def divergence(
    student_ptr,
    teacher_ptr,
    student_stride,
    teacher_stride,
    num_columns,
    state_ptr,
    loss_ptr,
    total_ptr,
    clipped_ptr,
    parameter,
    balance,
    clip,
    DIVERGENCE: tl.constexpr,
    HAS_CLIP: tl.constexpr,
    STATE: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    student_ptr += row * student_stride
    teacher_ptr += row * teacher_stride
    anchor_s, log_scale_s, anchor_t, log_scale_t, _ = known_of(state_ptr + row * STATE)
    loss = tl.zeros([BLOCK_V], tl.float32)
    total = tl.zeros([BLOCK_V], tl.float32)
    clipped = tl.zeros([BLOCK_V], tl.float32)
    for start in range(0, num_columns, BLOCK_V):
        offs_v = start + tl.arange(0, BLOCK_V)
        log_s = log_probs(student_ptr, offs_v, num_columns, anchor_s, log_scale_s)
        log_t = log_probs(teacher_ptr, offs_v, num_columns, anchor_t, log_scale_t)
        term, dlog_s, cut = clipped_term(
            log_s, log_t, parameter, balance, clip, DIVERGENCE, HAS_CLIP
        )
        loss += term
        total += dlog_s
        clipped += cut
    tl.store(loss_ptr + row, tl.sum(loss, axis=0))
    tl.store(total_ptr + row, tl.sum(total, axis=0))
    tl.store(clipped_ptr + row, tl.sum(clipped, axis=0))


@triton.jit
def divergence_gradient(
    student_ptr,
    teacher_ptr,
    student_stride,
    teacher_stride,
    num_columns,
    state_ptr,
    loss_ptr,
    total_ptr,
    row_weights_ptr,
    out_ptr,
    out_stride,
    parameter,
    balance,
    clip,
    ratio_share,  # of the total, the student's mean log-ratio; where the total is not given
    inverse_cap,
    DIVERGENCE: tl.constexpr,
    HAS_CLIP: tl.constexpr,
    HAS_TOTAL: tl.constexpr,  # else the loss is summed here too
    HAS_CAP: tl.constexpr,
    IN_PLACE: tl.constexpr,
    STATE: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    student_ptr += row * student_stride
    teacher_ptr += row * teacher_stride
    out_ptr += row * out_stride
    anchor_s, log_scale_s, anchor_t, log_scale_t, mean_ratio = known_of(state_ptr + row * STATE)
    row_weights = tl.load(row_weights_ptr + row)
    if HAS_TOTAL:
        total = tl.load(total_ptr + row)
    else:
        total = ratio_share * mean_ratio
    loss = tl.zeros([BLOCK_V], tl.float32)
    for start in range(0, num_columns, BLOCK_V):
        offs_v = start + tl.arange(0, BLOCK_V)
        z = load(student_ptr, offs_v, num_columns)
        log_s = (z - anchor_s) - log_scale_s
        log_t = log_probs(teacher_ptr, offs_v, num_columns, anchor_t, log_scale_t)
        term, dlog_s, _ = clipped_term(log_s, log_t, parameter, balance, clip, DIVERGENCE, HAS_CLIP)
        loss += term
        dlogits = (dlog_s - tl.exp(log_s) * total) * row_weights
        dlogits = tl.where(row_weights == 0, 0.0, dlogits)  # a token that is cut may be infinite
        write(out_ptr, offs_v, num_columns, dlogits, z, inverse_cap, HAS_CAP, IN_PLACE)
    if not HAS_TOTAL:
        tl.store(loss_ptr + row, tl.sum(loss, axis=0))


@triton.jit
def softmax_gradient(
    logits_ptr,
    stride,
    num_columns,
    normalizer_ptr,
    constant_ptr,
    slope_ptr,
    out_ptr,
    out_stride,
    inverse_cap,
    HAS_SLOPE: tl.constexpr,
    HAS_CAP: tl.constexpr,
    IN_PLACE: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    normalizer, constant = tl.load(normalizer_ptr + row), tl.load(constant_ptr + row)
    for start in range(0, num_columns, BLOCK_V):
        offs_v = start + tl.arange(0, BLOCK_V)
        z = load(logits_ptr + row * stride, offs_v, num_columns)
        share = tl.exp(z - normalizer)
        factor = constant
        if HAS_SLOPE:
            factor += tl.load(slope_ptr + row) * tl.where(share == 0, 0.0, z - normalizer)
        dlogits = share * factor
        to = out_ptr + row * out_stride
        write(to, offs_v, num_columns, dlogits, z, inverse_cap, HAS_CAP, IN_PLACE)


@triton.jit
def write(
    out_ptr,
    offs_v,
    num_columns,
    dlogits,
    logits,
    inverse_cap,
    HAS_CAP: tl.constexpr,
    IN_PLACE: tl.constexpr,
):
    """Store a block of gradient, in place over the logits that it was made from.

    In place, all threads must have read theirs before any thread writes.
    """
    if HAS_CAP:
        share = logits * inverse_cap
        dlogits = tl.where(logits == -float("inf"), 0.0, dlogits * (1 - share * share))
    if IN_PLACE:
        tl.debug_barrier()
    tl.store(out_ptr + offs_v, dlogits.to(out_ptr.dtype.element_ty), mask=offs_v < num_columns)


@triton.jit
def row_metrics(
    student_ptr,
    teacher_ptr,
    student_stride,
    teacher_stride,
    num_columns,
    state_ptr,
    out_ptr,
    out_stride,
    STATE: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    student_ptr += row * student_stride
    teacher_ptr += row * teacher_stride
    anchor_s, log_scale_s, anchor_t, log_scale_t, _ = known_of(state_ptr + row * STATE)
    forward = tl.zeros([BLOCK_V], tl.float32)
    reverse = tl.zeros([BLOCK_V], tl.float32)
    mixture = tl.zeros([BLOCK_V], tl.float32)
    entropy_s = tl.zeros([BLOCK_V], tl.float32)
    entropy_t = tl.zeros([BLOCK_V], tl.float32)
    for start in range(0, num_columns, BLOCK_V):
        offs_v = start + tl.arange(0, BLOCK_V)
        log_s = log_probs(student_ptr, offs_v, num_columns, anchor_s, log_scale_s)
        log_t = log_probs(teacher_ptr, offs_v, num_columns, anchor_t, log_scale_t)
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
