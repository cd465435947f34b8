"""The programs behind the row functions: each walks one row of fp32 logits in blocks of columns."""

import triton
import triton.language as tl

from fused_sd.kernels.divergence import forward_kl, jsd, reverse_kl


@triton.jit
def load(row_ptr, offs_v, num_columns):
    return tl.load(row_ptr + offs_v, mask=offs_v < num_columns, other=-float("inf"))


@triton.jit
def clipped_term(
    log_s, log_t, parameter, slope, clip, DIVERGENCE: tl.constexpr, HAS_CLIP: tl.constexpr
):
    """The balanced term and, under an entry clip, 1 where the plain one is cut.

    The cut entries carry the shift between the two, as ``DivergenceTerm.clipped`` explains.
    """
    term, dlog_s = DIVERGENCE(log_s, log_t, parameter)
    cut = tl.zeros_like(term)
    if HAS_CLIP:
        s = tl.exp(log_s)
        shift = slope * (s - tl.exp(log_t))
        above = term + shift > clip
        cut = tl.where(above, 1.0, 0.0)
        dlog_s = tl.where(above, -slope * s, dlog_s)
        term = tl.where(above, clip - shift, term)
    return term, dlog_s, cut


@triton.jit
def log_normalizer(logits_ptr, stride, num_columns, lse_ptr, BLOCK_V: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    largest = -float("inf")
    scale = 0.0
    for start in range(0, num_columns, BLOCK_V):
        offs_v = start + tl.arange(0, BLOCK_V)
        z = load(logits_ptr + row * stride, offs_v, num_columns)
        above = tl.maximum(largest, tl.max(z, axis=0))
        anchor = tl.where(above == -float("inf"), 0.0, above)  # a block of -inf has no anchor
        scale = scale * tl.exp(largest - anchor) + tl.sum(tl.exp(z - anchor), axis=0)
        largest = above
    anchor = tl.where(largest == -float("inf"), 0.0, largest)
    tl.store(lse_ptr + row, anchor + tl.log(scale))


@triton.jit
def entropy(logits_ptr, stride, num_columns, lse_ptr, out_ptr, BLOCK_V: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    lse = tl.load(lse_ptr + row)
    total = tl.zeros([BLOCK_V], tl.float32)
    for start in range(0, num_columns, BLOCK_V):
        offs_v = start + tl.arange(0, BLOCK_V)
        total += entropy_term(load(logits_ptr + row * stride, offs_v, num_columns) - lse)
    tl.store(out_ptr + row, tl.sum(total, axis=0))


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
    lse_s_ptr,
    lse_t_ptr,
    loss_ptr,
    total_ptr,
    clipped_ptr,
    parameter,
    slope,
    clip,
    DIVERGENCE: tl.constexpr,
    HAS_CLIP: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    lse_s, lse_t = tl.load(lse_s_ptr + row), tl.load(lse_t_ptr + row)
    loss = tl.zeros([BLOCK_V], tl.float32)
    total = tl.zeros([BLOCK_V], tl.float32)
    clipped = tl.zeros([BLOCK_V], tl.float32)
    for start in range(0, num_columns, BLOCK_V):
        offs_v = start + tl.arange(0, BLOCK_V)
        log_s = load(student_ptr + row * student_stride, offs_v, num_columns) - lse_s
        log_t = load(teacher_ptr + row * teacher_stride, offs_v, num_columns) - lse_t
        term, dlog_s, cut = clipped_term(log_s, log_t, parameter, slope, clip, DIVERGENCE, HAS_CLIP)
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
    lse_s_ptr,
    lse_t_ptr,
    total_ptr,
    upstream_ptr,
    out_ptr,
    out_stride,
    parameter,
    slope,
    clip,
    inverse_cap,
    DIVERGENCE: tl.constexpr,
    HAS_CLIP: tl.constexpr,
    HAS_CAP: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    lse_s, lse_t = tl.load(lse_s_ptr + row), tl.load(lse_t_ptr + row)
    total, upstream = tl.load(total_ptr + row), tl.load(upstream_ptr + row)
    for start in range(0, num_columns, BLOCK_V):
        offs_v = start + tl.arange(0, BLOCK_V)
        z = load(student_ptr + row * student_stride, offs_v, num_columns)
        log_t = load(teacher_ptr + row * teacher_stride, offs_v, num_columns) - lse_t
        _, dlog_s, _ = clipped_term(z - lse_s, log_t, parameter, slope, clip, DIVERGENCE, HAS_CLIP)
        dlogits = (dlog_s - tl.exp(z - lse_s) * total) * upstream
        dlogits = tl.where(upstream == 0, 0.0, dlogits)  # a token that is cut may be infinite
        overwrite(out_ptr + row * out_stride, offs_v, num_columns, dlogits, z, inverse_cap, HAS_CAP)


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
        overwrite(out_ptr + row * out_stride, offs_v, num_columns, dlogits, z, inverse_cap, HAS_CAP)


@triton.jit
def overwrite(out_ptr, offs_v, num_columns, dlogits, logits, inverse_cap, HAS_CAP: tl.constexpr):
    """Store a block of gradient over the row of logits it was made from.

    A 16-bit block lies where logits of this block or of earlier ones were: all threads must have
    read theirs before any thread writes.
    """
    if HAS_CAP:
        share = logits * inverse_cap
        dlogits = tl.where(logits == -float("inf"), 0.0, dlogits * (1 - share * share))
    tl.debug_barrier()
    tl.store(out_ptr + offs_v, dlogits.to(out_ptr.dtype.element_ty), mask=offs_v < num_columns)


@triton.jit
def summary(
    student_ptr,
    teacher_ptr,
    student_stride,
    teacher_stride,
    num_columns,
    lse_s_ptr,
    lse_t_ptr,
    out_ptr,
    out_stride,
    BLOCK_V: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    lse_s, lse_t = tl.load(lse_s_ptr + row), tl.load(lse_t_ptr + row)
    forward = tl.zeros([BLOCK_V], tl.float32)
    reverse = tl.zeros([BLOCK_V], tl.float32)
    mixture = tl.zeros([BLOCK_V], tl.float32)
    entropy_s = tl.zeros([BLOCK_V], tl.float32)
    entropy_t = tl.zeros([BLOCK_V], tl.float32)
    for start in range(0, num_columns, BLOCK_V):
        offs_v = start + tl.arange(0, BLOCK_V)
        log_s = load(student_ptr + row * student_stride, offs_v, num_columns) - lse_s
        log_t = load(teacher_ptr + row * teacher_stride, offs_v, num_columns) - lse_t
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


@triton.jit
def block_maxima(
    logits_ptr,
    stride,
    num_columns,
    out_ptr,
    num_blocks,
    num_segments,
    BLOCK: tl.constexpr,
    SEGMENT: tl.constexpr,
):
    row = (tl.program_id(0) // num_segments).to(tl.int64)
    blocks = tl.program_id(0) % num_segments * SEGMENT + tl.arange(0, SEGMENT)
    offs_v = blocks[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    z = load(logits_ptr + row * stride, offs_v, num_columns)
    tl.store(out_ptr + row * num_blocks + blocks, tl.max(z, axis=1), mask=blocks < num_blocks)
