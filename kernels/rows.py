"""Row functions in Triton: the twin of ``fused_sd/rows.py``, with the same names and arguments.

One program walks one row of fp32 logits in blocks of columns.  Launchers stand above, kernels
below.

Dimension key:  C rows in a chunk, V columns (with padding columns of -inf)
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fused_sd.chunking import gradient_view
from fused_sd.divergence import DivergenceTerm
from fused_sd.kernels.divergence import TERMS, forward_kl, jsd, reverse_kl
from fused_sd.rows import Summary
from fused_sd.support import BLOCK

BLOCK_V = 2048  # columns a program holds at a time: two sides and their terms fit the registers
NUM_WARPS = 8
SEGMENT = 32  # blocks whose maxima one program finds


def log_normalizer(logits: Tensor) -> Tensor:
    """Log-sum-exp of each row: (C,)."""
    lse = logits.new_empty(logits.shape[0])
    _launch(_log_normalizer, logits, logits, logits.stride(0), logits.shape[1], lse)
    return lse


def entropy(logits: Tensor, lse: Tensor) -> Tensor:
    """Entropy of each row in nats: (C,)."""
    out = torch.empty_like(lse)
    _launch(_entropy, logits, logits, logits.stride(0), logits.shape[1], lse, out)
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
        _divergence,
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
        _divergence_gradient,
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
        _softmax_gradient,
        logits,
        *(logits, logits.stride(0), logits.shape[1], normalizer, constant),
        *(constant if slope is None else slope, out, out.stride(0)),
        1.0 if cap is None else 1 / cap,
        HAS_SLOPE=slope is not None,
        HAS_CAP=cap is not None,
    )
    return out


def summary(student: Tensor, teacher: Tensor, lse_s: Tensor, lse_t: Tensor) -> Summary:
    """Both KLs, the JSD at 1/2 and both entropies over the full vocabulary."""
    out = lse_s.new_empty((5, lse_s.shape[0]))
    _launch(_summary, student, *_pair(student, teacher, lse_s, lse_t), out, out.stride(0))
    return Summary(*out.unbind(0))


def block_maxima(logits: Tensor) -> Tensor:
    """The largest logit of every ``BLOCK`` columns: (C, ceil(V / BLOCK))."""
    num_rows, num_columns = logits.shape
    num_blocks = triton.cdiv(num_columns, BLOCK)
    out = logits.new_empty((num_rows, num_blocks))
    num_segments = triton.cdiv(num_blocks, SEGMENT)
    if num_rows:
        _block_maxima[(num_rows * num_segments,)](
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


@triton.jit
def _load(row_ptr, offs_v, num_columns):
    return tl.load(row_ptr + offs_v, mask=offs_v < num_columns, other=-float("inf"))


@triton.jit
def _term(log_s, log_t, parameter, slope, clip, DIVERGENCE: tl.constexpr, HAS_CLIP: tl.constexpr):
    """The balanced term, or under an entry clip the plain one, cut; and 1 where it was cut."""
    term, dlog_s = DIVERGENCE(log_s, log_t, parameter)
    cut = tl.zeros_like(term)
    if HAS_CLIP:
        s = tl.exp(log_s)
        term += slope * (s - tl.exp(log_t))
        dlog_s += slope * s
        cut = tl.where(term > clip, 1.0, 0.0)
        dlog_s = tl.where(term > clip, 0.0, dlog_s)
        term = tl.where(term > clip, clip, term)
    return term, dlog_s, cut


@triton.jit
def _log_normalizer(logits_ptr, stride, num_columns, lse_ptr, BLOCK_V: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    largest = -float("inf")
    scale = 0.0
    for start in range(0, num_columns, BLOCK_V):
        offs_v = start + tl.arange(0, BLOCK_V)
        z = _load(logits_ptr + row * stride, offs_v, num_columns)
        above = tl.maximum(largest, tl.max(z, axis=0))
        anchor = tl.where(above == -float("inf"), 0.0, above)  # a block of -inf has no anchor
        scale = scale * tl.exp(largest - anchor) + tl.sum(tl.exp(z - anchor), axis=0)
        largest = above
    anchor = tl.where(largest == -float("inf"), 0.0, largest)
    tl.store(lse_ptr + row, anchor + tl.log(scale))


@triton.jit
def _entropy(logits_ptr, stride, num_columns, lse_ptr, out_ptr, BLOCK_V: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    lse = tl.load(lse_ptr + row)
    total = tl.zeros([BLOCK_V], tl.float32)
    for start in range(0, num_columns, BLOCK_V):
        offs_v = start + tl.arange(0, BLOCK_V)
        total += _entropy_term(_load(logits_ptr + row * stride, offs_v, num_columns) - lse)
    tl.store(out_ptr + row, tl.sum(total, axis=0))


@triton.jit
def _entropy_term(log_prob):
    share = tl.exp(log_prob)
    return tl.where(share == 0, 0.0, -share * log_prob)


@triton.jit
def _divergence(
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
        log_s = _load(student_ptr + row * student_stride, offs_v, num_columns) - lse_s
        log_t = _load(teacher_ptr + row * teacher_stride, offs_v, num_columns) - lse_t
        term, dlog_s, cut = _term(log_s, log_t, parameter, slope, clip, DIVERGENCE, HAS_CLIP)
        loss += term
        total += dlog_s
        clipped += cut
    tl.store(loss_ptr + row, tl.sum(loss, axis=0))
    tl.store(total_ptr + row, tl.sum(total, axis=0))
    tl.store(clipped_ptr + row, tl.sum(clipped, axis=0))


@triton.jit
def _divergence_gradient(
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
        z = _load(student_ptr + row * student_stride, offs_v, num_columns)
        log_t = _load(teacher_ptr + row * teacher_stride, offs_v, num_columns) - lse_t
        _, dlog_s, _ = _term(z - lse_s, log_t, parameter, slope, clip, DIVERGENCE, HAS_CLIP)
        dlogits = (dlog_s - tl.exp(z - lse_s) * total) * upstream
        dlogits = tl.where(upstream == 0, 0.0, dlogits)  # a token that is cut may be infinite
        _overwrite(
            out_ptr + row * out_stride, offs_v, num_columns, dlogits, z, inverse_cap, HAS_CAP
        )


@triton.jit
def _softmax_gradient(
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
        z = _load(logits_ptr + row * stride, offs_v, num_columns)
        share = tl.exp(z - normalizer)
        factor = constant
        if HAS_SLOPE:
            factor += tl.load(slope_ptr + row) * tl.where(share == 0, 0.0, z - normalizer)
        dlogits = share * factor
        _overwrite(
            out_ptr + row * out_stride, offs_v, num_columns, dlogits, z, inverse_cap, HAS_CAP
        )


@triton.jit
def _overwrite(out_ptr, offs_v, num_columns, dlogits, logits, inverse_cap, HAS_CAP: tl.constexpr):
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
def _summary(
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
        log_s = _load(student_ptr + row * student_stride, offs_v, num_columns) - lse_s
        log_t = _load(teacher_ptr + row * teacher_stride, offs_v, num_columns) - lse_t
        forward += forward_kl(log_s, log_t, 0.0)[0]
        reverse += reverse_kl(log_s, log_t, 0.0)[0]
        mixture += jsd(log_s, log_t, 0.5)[0]
        entropy_s += _entropy_term(log_s)
        entropy_t += _entropy_term(log_t)
    tl.store(out_ptr + row, tl.sum(forward, axis=0))
    tl.store(out_ptr + out_stride + row, tl.sum(reverse, axis=0))
    tl.store(out_ptr + 2 * out_stride + row, tl.sum(mixture, axis=0))
    tl.store(out_ptr + 3 * out_stride + row, tl.sum(entropy_s, axis=0))
    tl.store(out_ptr + 4 * out_stride + row, tl.sum(entropy_t, axis=0))


@triton.jit
def _block_maxima(
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
    z = _load(logits_ptr + row * stride, offs_v, num_columns)
    tl.store(out_ptr + row * num_blocks + blocks, tl.max(z, axis=1), mask=blocks < num_blocks)
