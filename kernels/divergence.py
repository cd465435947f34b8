"""The divergences of ``fused_sd/terms/divergence.py`` for Triton: same names, order and results.

A program takes a divergence as a compile-time constant and inlines it.  A divergence takes two
blocks of fp32 log-probabilities of the same entries and its ``parameter``, and returns the block of
balanced terms and the block of their derivatives w.r.t. ``log_s``, as if ``log_s`` were free.

Terms of close sides are differences of nearly equal numbers.  ``expm1`` and ``log1p``, which keep
their digits, are not part of Triton's language, so this file writes them as series.

Symbols: s student, t teacher, m their mixture, r = log s - log t.
"""

import triton
import triton.language as tl

from fused_sd.terms.divergence import DIVERGENCES


@triton.jit
def expm1_excess(x):
    """``exp(x) - 1 - x`` for ``|x| <= 1/2`` from its Taylor series, exact to fp32 rounding."""
    series = 1 + x * (1 / 8) * (1 + x * (1 / 9))
    series = 1 + x * (1 / 5) * (1 + x * (1 / 6) * (1 + x * (1 / 7) * series))
    return 0.5 * x * x * (1 + x * (1 / 3) * (1 + x * (1 / 4) * series))


@triton.jit
def expm1(x):
    """``exp(x) - 1`` for ``x <= 0`` without cancellation."""
    return tl.where(x > -0.5, x + expm1_excess(tl.maximum(x, -0.5)), tl.exp(x) - 1)


@triton.jit
def log1p(x):
    """``log(1 + x)`` for ``-1 <= x <= 0`` without cancellation; ``2 artanh(y)`` near 0."""
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
    """``log m - log s`` and ``log m - log t`` of ``m = teacher_weight t + (1 - teacher_weight) s``.

    Both are computed from the ratio of the mixture to the larger side, which is bounded.
    """
    larger_s = r >= 0
    weight = tl.where(larger_s, teacher_weight, 1 - teacher_weight)
    step = log1p(weight * expm1(-tl.abs(r)))
    return tl.where(larger_s, step, step - r), tl.where(larger_s, step + r, step)


@triton.jit
def forward_kl(log_s, log_t, parameter):
    """KL(t||s); ``parameter`` is unused."""
    s, t, r = tl.exp(log_s), tl.exp(log_t), log_s - log_t
    near = tl.where(tl.abs(r) < 0.5, r, 0.0)
    return excess(r, s, t), tl.where(tl.abs(r) < 0.5, s * (near - expm1_excess(-near)), s - t)


@triton.jit
def reverse_kl(log_s, log_t, parameter):
    """KL(s||t); ``parameter`` is unused."""
    s, t = tl.exp(log_s), tl.exp(log_t)
    r = log_s - log_t
    return excess(-r, t, s), tl.where(s == 0, 0.0, s * r)


@triton.jit
def jsd(log_s, log_t, parameter):
    """Generalised JSD; ``parameter`` is beta, the teacher's weight in the mixture."""
    s, t, r = tl.exp(log_s), tl.exp(log_t), log_s - log_t
    m = parameter * t + (1 - parameter) * s
    m_over_s, m_over_t = mixture_ratios(r, parameter)
    term = (1 - parameter) * excess(m_over_s, m, s) + parameter * excess(m_over_t, m, t)
    return term, tl.where(s == 0, 0.0, -(1 - parameter) * s * m_over_s)


@triton.jit
def mixed_kl(log_s, log_t, parameter):
    """Weighted sum of both KLs; ``parameter`` is the weight of the forward KL."""
    forward, dforward = forward_kl(log_s, log_t, 0.0)
    reverse, dreverse = reverse_kl(log_s, log_t, 0.0)
    term = parameter * forward + (1 - parameter) * reverse
    return term, parameter * dforward + (1 - parameter) * dreverse


@triton.jit
def skew_kl(log_s, log_t, parameter):
    """Skew KL; ``parameter`` is the student's weight in the mixture."""
    s, t, r = tl.exp(log_s), tl.exp(log_t), log_s - log_t
    m = (1 - parameter) * t + parameter * s
    _, m_over_t = mixture_ratios(r, 1 - parameter)
    change = expm1(-tl.abs(m_over_t))
    share = tl.where(m_over_t >= 0, -change, tl.exp(-m_over_t) * change)  # 1 - t / m
    return excess(m_over_t, m, t), tl.where(s == 0, 0.0, parameter * s * share)


def _twins() -> dict:
    """The program of each divergence of the table."""
    missing = [name for name in DIVERGENCES if name not in globals()]
    assert not missing, f"write the twins of {missing} in kernels/divergence.py"
    return {name: globals()[name] for name in DIVERGENCES}


TERMS = _twins()
