"""The divergences of ``fused_sd/terms/divergence.py`` for Triton: same names, order and results.

A program takes a divergence as a compile-time constant and inlines it.  A divergence takes two
blocks of fp32 log-probabilities of the same entries and its ``parameter``, and returns the block of
balanced terms and the block of their derivatives w.r.t. ``log_s``, as if ``log_s`` were free.
``program_arguments`` says which function a launch takes, and with which parameter.

Terms of close sides are differences of nearly equal numbers.  ``expm1`` and ``log1p``, which keep
their digits, are not part of Triton's language, so this file writes them as polynomials.  The
coefficients interpolate at Chebyshev points, which spreads the error evenly.

Instructions count: an H100 executes some forty of them a column in the time in which it reads one
logit of each.  So an exponential is one ``exp2``, and a logarithm one ``lg2`` where its error does
not show.  ``tests/kernels/test_instructions.py`` holds what each divergence may take.

Symbols: s student, t teacher, m their mixture, r = log s - log t.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import triton
import triton.language as tl
from triton.language.extra import libdevice
from triton.language.target_info import is_cuda

from fused_sd.terms.divergence import DIVERGENCES
from fused_sd.terms.divergence_term import DivergenceTerm

LOG2E = tl.constexpr(1.4426950408889634)
IS_COMPILED = tl.constexpr(not triton.knobs.runtime.interpret)
FARTHEST = tl.constexpr(100.0)  # exp(-100) is 0 beside every probability of fp32
NEAR = 1.0  # largest |r| of two sides whose mixture is evaluated by polynomials in r
MIXTURE_NEAR = tl.constexpr(NEAR)
NUM_COEFFICIENTS = 5  # of either half of such a polynomial: 3e-8 of it
NEGLIGIBLE = 1e-9  # coefficients below this add nothing in fp32


@triton.jit
def exp(x):
    """``exp(x)`` in two instructions (``tl.exp`` takes five); below 2^-126 it is 0."""
    return tl.exp2(x * LOG2E)


@triton.jit
def fast_log(x):
    """``log(x)`` for normal ``x`` in (0, 1), in two instructions where ``tl.log`` takes 21.

    NVIDIA's ``lg2.approx`` is off by 2^-22 for x above 1/2 and by 2^-22 of the result below.  So no
    x may be so close to 1 that this is a large part of the logarithm.
    """
    if IS_COMPILED and is_cuda():
        return libdevice.fast_logf(x)
    return tl.log(x)


@triton.jit
def horner(x, coefficients):
    """The polynomial in ``x`` with a tuple of coefficients, the constant one first."""
    value = coefficients[len(coefficients) - 1]
    for i in tl.static_range(2, len(coefficients) + 1):
        value = value * x + coefficients[len(coefficients) - i]
    return value


@triton.jit
def even_and_odd(x, halves):
    """``even(x^2) + x odd(x^2)`` of the coefficients of both; an ``odd`` of None is 0."""
    even, odd = halves
    value = horner(x * x, even)
    if odd is not None:
        value = value + x * horner(x * x, odd)
    return value


@triton.jit
def excess_ratio(x):
    """``(exp(x) - 1 - x) / x`` for ``|x| <= 1/2``, off by 6e-8 of itself."""
    high = 0.008333235979080200 + x * (0.0013982185628265142 + x * 0.00019944873929489404)
    return x * (0.5 + x * (0.1666666716337204 + x * (0.04166579246520996 + x * high)))


@triton.jit
def expm1(x):
    """``exp(x) - 1`` for ``x <= 0`` without cancellation."""
    return tl.where(x > -0.5, x + x * excess_ratio(x), exp(x) - 1)


@triton.jit
def log1p_ratio(x):
    """``log(1 + x) / x`` for ``-1/4 <= x <= 0``, off by 7e-8 of itself."""
    high = -0.2576442062854767 + x * (0.14463114738464355 + x * -0.3386436402797699)
    return 0.9999999403953552 + x * (-0.500010073184967 + x * (0.33287033438682556 + x * high))


@triton.jit
def times_log(prob, log_ratio):
    """``prob * log_ratio``, 0 where ``prob`` is 0 and the ratio is infinite or none."""
    return tl.where(prob == 0, 0.0, prob * log_ratio)


@triton.jit
def excess(log_ratio, a, b):
    """``(a - b) - b * log_ratio`` of ``log_ratio = log a - log b``: at least 0, and 0 at a = b."""
    linear = times_log(b, log_ratio)
    near = linear * excess_ratio(log_ratio)
    return tl.where(tl.abs(log_ratio) < 0.5, near, (a - b) - linear)


@triton.jit
def mixture_ratios(r, teacher_weight):
    """``log m - log s`` and ``log m - log t`` of ``m = teacher_weight t + (1 - teacher_weight) s``.

    Both are computed from the ratio of the mixture to the larger side, which is bounded.
    """
    larger_s = r >= 0
    weight = tl.where(larger_s, teacher_weight, 1 - teacher_weight)
    change = weight * expm1(-tl.abs(r))
    # 1 + change would cancel where the mixture is almost the smaller side
    far = tl.log((1 - weight) + weight * exp(-tl.abs(r)))
    step = tl.where(change > -0.25, change * log1p_ratio(change), far)
    return tl.where(larger_s, step, step - r), tl.where(larger_s, step + r, step)


@triton.jit
def far_mixture_ratios(r, teacher_weight):
    """As ``mixture_ratios``, for a mixture that is close to neither side; finite for every r."""
    larger_s = r >= 0
    distance = tl.where(tl.abs(r) < FARTHEST, tl.abs(r), FARTHEST)  # a NaN becomes FARTHEST
    weight = tl.where(larger_s, teacher_weight, 1 - teacher_weight)
    step = fast_log((1 - weight) + weight * exp(-distance))
    return tl.where(larger_s, step, step + distance), tl.where(larger_s, step + distance, step)


@triton.jit
def forward_kl(log_s, log_t, parameter):
    """KL(t||s); ``parameter`` is unused."""
    s, t, r = exp(log_s), exp(log_t), log_s - log_t
    is_near, linear = tl.abs(r) < 0.5, times_log(t, r)
    near = linear * excess_ratio(r)
    return tl.where(is_near, near, (s - t) - linear), tl.where(is_near, linear + near, s - t)


@triton.jit
def reverse_kl(log_s, log_t, parameter):
    """KL(s||t); ``parameter`` is unused."""
    s, t, r = exp(log_s), exp(log_t), log_s - log_t
    linear = times_log(s, r)
    term = tl.where(tl.abs(r) < 0.5, -linear * excess_ratio(-r), linear - (s - t))
    return term, linear


@triton.jit
def jsd(log_s, log_t, parameter):
    """Generalised JSD; ``parameter`` is beta, the teacher's weight in the mixture."""
    s, t, r = exp(log_s), exp(log_t), log_s - log_t
    m = parameter * t + (1 - parameter) * s
    m_over_s, m_over_t = mixture_ratios(r, parameter)
    term = (1 - parameter) * excess(m_over_s, m, s) + parameter * excess(m_over_t, m, t)
    return term, -(1 - parameter) * times_log(s, m_over_s)


@triton.jit
def moderate_jsd(log_s, log_t, parameter):
    """``jsd`` of a beta from 0.1 to 0.9; ``parameter`` is ``jsd_parameter(beta)``.

    Near terms are products of positive factors.  Far ones are sums whose larger part is at most
    three times the result, so that the error of ``fast_log`` is at most 7e-6 of a term.
    """
    beta, curvature, slope = parameter
    s, t, r = exp(log_s), exp(log_t), log_s - log_t
    is_near = tl.abs(r) < MIXTURE_NEAR
    student, teacher = (1 - beta) * s, beta * t
    m_over_s, m_over_t = far_mixture_ratios(r, beta)
    near = (student + teacher) * (r * r * even_and_odd(r, curvature))
    term = tl.where(is_near, near, -(student * m_over_s + teacher * m_over_t))
    return term, -student * tl.where(is_near, r * even_and_odd(r, slope), m_over_s)


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
    s, t, r = exp(log_s), exp(log_t), log_s - log_t
    m = (1 - parameter) * t + parameter * s
    _, m_over_t = mixture_ratios(r, 1 - parameter)
    change = expm1(-tl.abs(m_over_t))
    share = tl.where(m_over_t >= 0, -change, exp(-m_over_t) * change)  # 1 - t / m
    return excess(m_over_t, m, t), parameter * times_log(s, share)


@triton.jit
def moderate_skew_kl(log_s, log_t, parameter):
    """``skew_kl`` of a weight from 0.5 to 0.999; ``parameter`` is ``skew_parameter(weight)``."""
    weight, curvature, slope = parameter
    s, t, r = exp(log_s), exp(log_t), log_s - log_t
    is_near = tl.abs(r) < MIXTURE_NEAR
    _, m_over_t = far_mixture_ratios(r, 1 - weight)
    near = t * (r * r * even_and_odd(r, curvature))
    far = weight * (s - t) - t * m_over_t
    share = tl.where(is_near, r * even_and_odd(r, slope), 1 - exp(-m_over_t))  # 1 - t / m
    return tl.where(is_near, near, far), weight * s * share


Halves = tuple[tuple[float, ...], tuple[float, ...] | None]


@functools.lru_cache
def jsd_parameter(beta: float) -> tuple[float, Halves, Halves]:
    """Beta with two polynomials in r: ``term / (m r^2)``, which is positive, and ``log(m/s) / r``.

    The term is ``beta t log(t/m) + (1 - beta) s log(s/m)``.  Over ``m r^2`` it is a function of r
    alone, as ``log(m/s)`` is: with ``m/s = 1 + beta (exp(-r) - 1)`` both are smooth up to
    ``|r| = pi``.  At beta = 1/2 the one is even and the other even but for ``-r / 2``, so that half
    of the coefficients vanish.
    """

    def curvature(r: float) -> float:
        m = 1 + beta * math.expm1(-r)
        m_over_s = math.log1p(beta * math.expm1(-r))
        return -((1 - beta) * m_over_s + beta * math.exp(-r) * (r + m_over_s)) / (m * r * r)

    def slope(r: float) -> float:
        return math.log1p(beta * math.expm1(-r)) / r

    return beta, _interpolate(curvature), _interpolate(slope)


@functools.lru_cache
def skew_parameter(weight: float) -> tuple[float, Halves, Halves]:
    """The student's weight with two polynomials in r: ``term / (t r^2)`` and ``(1 - t/m) / r``.

    The balanced term is ``m - t - t log(m/t)``, and ``m/t = 1 + weight (exp(r) - 1)``.
    """

    def curvature(r: float) -> float:
        change = weight * math.expm1(r)
        return (change - math.log1p(change)) / (r * r)

    def slope(r: float) -> float:
        change = weight * math.expm1(r)
        return change / ((1 + change) * r)

    return weight, _interpolate(curvature), _interpolate(slope)


def _interpolate(function: Callable[[float], float]) -> Halves:
    """Coefficients of ``even_and_odd`` that interpolate a smooth function for ``|x| <= NEAR``."""
    count = NUM_COEFFICIENTS
    squares = [NEAR**2 * (1 + math.cos((i + 0.5) * math.pi / count)) / 2 for i in range(count)]
    pairs = [(x, function(x), function(-x)) for x in map(math.sqrt, squares)]
    even = _polynomial(squares, [(right + left) / 2 for _, right, left in pairs])
    odd = _polynomial(squares, [(right - left) / (2 * x) for x, right, left in pairs])
    if all(abs(c) < NEGLIGIBLE for c in even[1:]):
        del even[1:]
    has_odd = any(abs(c) >= NEGLIGIBLE for c in odd)
    return tuple(even), tuple(odd) if has_odd else None


def _polynomial(points: list[float], values: list[float]) -> list[float]:
    """Coefficients, the constant one first, of the polynomial with these values at these points."""
    differences = list(values)  # Newton's divided differences
    for order in range(1, len(points)):
        for i in range(len(points) - 1, order - 1, -1):
            change = differences[i] - differences[i - 1]
            differences[i] = change / (points[i] - points[i - order])
    coefficients: list[float] = []
    for point, difference in zip(reversed(points), reversed(differences)):
        times_x = [0.0, *coefficients]
        coefficients = [up - point * c for up, c in zip(times_x, [*coefficients, 0.0])]
        coefficients[0] += difference
    return coefficients


def program_arguments(term: DivergenceTerm) -> dict[str, Any]:
    """``DIVERGENCE`` and ``parameter`` of a launch that sums a divergence.

    For most weights a mixture has a function that takes half the instructions.  Towards the ends of
    the weight the general function keeps the digits of a mixture that is close to one side however
    far the other side is.
    """
    if term.name == "jsd" and 0.1 <= term.parameter <= 0.9:
        return {"DIVERGENCE": moderate_jsd, "parameter": jsd_parameter(term.parameter)}
    if term.name == "skew_kl" and 0.5 <= term.parameter <= 0.999:
        return {"DIVERGENCE": moderate_skew_kl, "parameter": skew_parameter(term.parameter)}
    return {"DIVERGENCE": TERMS[term.name], "parameter": term.parameter}


def _twins() -> dict:
    """The program of each divergence of the table."""
    missing = [name for name in DIVERGENCES if name not in globals()]
    assert not missing, f"write the twins of {missing} in kernels/divergence.py"
    return {name: globals()[name] for name in DIVERGENCES}


TERMS = _twins()
