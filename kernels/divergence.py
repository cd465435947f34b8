"""The divergences of ``fused_sd/terms/divergence.py`` for Triton: same names, order and results.

Each is handed to a row kernel as a constant and inlined there.  Arguments are fp32 blocks.
"""

import triton
import triton.language as tl

from fused_sd.terms.divergence import DIVERGENCES


@triton.jit
def expm1_excess(x):
    """``expm1(x) - x`` for ``|x| <= 1/2``, to fp32 rounding: its Taylor series."""
    series = 1 + x * (1 / 8) * (1 + x * (1 / 9))
    series = 1 + x * (1 / 5) * (1 + x * (1 / 6) * (1 + x * (1 / 7) * series))
    return 0.5 * x * x * (1 + x * (1 / 3) * (1 + x * (1 / 4) * series))


@triton.jit
def expm1(x):
    """``exp(x) - 1`` for ``x <= 0`` without cancellation."""
    return tl.where(x > -0.5, x + expm1_excess(tl.maximum(x, -0.5)), tl.exp(x) - 1)


@triton.jit
def log1p(x):
    """``log(1 + x)`` for ``-1 <= x <= 0`` without cancellation: near 0 the series of artanh."""
    y = x / (2 + x)
    y2 = y * y
    series = 2 * y * (1 + y2 * (1 / 3 + y2 * (1 / 5 + y2 * (1 / 7 + y2 * (1 / 9)))))
    return tl.where(x > -0.25, series, tl.log(1 + x))


@triton.jit
def excess(log_ratio, a, b):
    """``(a - b) - b * log_ratio`` of ``log_ratio = log a - log b``: at least 0, and 0 at a = b."""
    is_near = tl.abs(log_ratio) < 0.5
    near = b * expm1_excess(tl.where(is_near, log_ratio, 0.0))
    far = (a - b) - b * log_ratio
    return tl.where(b == 0, a, tl.where(is_near, near, far))


@triton.jit
def mixture_ratios(r, teacher_weight):
    """``log m - log s`` and ``log m - log t`` of the mixture m with a given teacher's weight."""
    larger_s = r >= 0
    weight = tl.where(larger_s, teacher_weight, 1 - teacher_weight)
    step = log1p(weight * expm1(-tl.abs(r)))
    return tl.where(larger_s, step, step - r), tl.where(larger_s, step + r, step)


@triton.jit
def forward_kl(log_s, log_t, parameter):
    s, t, r = tl.exp(log_s), tl.exp(log_t), log_s - log_t
    near = tl.where(tl.abs(r) < 0.5, r, 0.0)
    return excess(r, s, t), tl.where(tl.abs(r) < 0.5, s * (near - expm1_excess(-near)), s - t)


@triton.jit
def reverse_kl(log_s, log_t, parameter):
    s, t = tl.exp(log_s), tl.exp(log_t)
    r = log_s - log_t
    return excess(-r, t, s), tl.where(s == 0, 0.0, s * r)


@triton.jit
def jsd(log_s, log_t, parameter):
    s, t, r = tl.exp(log_s), tl.exp(log_t), log_s - log_t
    m = parameter * t + (1 - parameter) * s
    m_over_s, m_over_t = mixture_ratios(r, parameter)
    term = (1 - parameter) * excess(m_over_s, m, s) + parameter * excess(m_over_t, m, t)
    return term, tl.where(s == 0, 0.0, -(1 - parameter) * s * m_over_s)


@triton.jit
def mixed_kl(log_s, log_t, parameter):
    forward, dforward = forward_kl(log_s, log_t, 0.0)
    reverse, dreverse = reverse_kl(log_s, log_t, 0.0)
    term = parameter * forward + (1 - parameter) * reverse
    return term, parameter * dforward + (1 - parameter) * dreverse


@triton.jit
def skew_kl(log_s, log_t, parameter):
    s, t, r = tl.exp(log_s), tl.exp(log_t), log_s - log_t
    m = (1 - parameter) * t + parameter * s
    _, m_over_t = mixture_ratios(r, 1 - parameter)
    change = expm1(-tl.abs(m_over_t))
    share = tl.where(m_over_t >= 0, -change, tl.exp(-m_over_t) * change)  # 1 - t / m
    return excess(m_over_t, m, t), tl.where(s == 0, 0.0, parameter * s * share)


TERMS = {name: globals()[name] for name in DIVERGENCES}
