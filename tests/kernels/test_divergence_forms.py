"""The polynomials and the forms of ``kernels/divergence.py``, entry by entry, against float64."""

import pytest
import torch
from torch import Tensor

import fused_sd
from fused_sd.terms.divergence import DIVERGENCES
from fused_sd.terms.divergence_term import divergence_term

triton = pytest.importorskip("triton")
import triton.language as tl

from fused_sd.kernels import divergence as forms

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BETAS = (0.001, 0.0999, 0.1, 0.3, 0.5, 0.7, 0.9, 0.9001, 0.999)
WEIGHTS = (0.001, 0.1, 0.4999, 0.5, 0.9, 0.999, 0.9991)
CASES = ["forward_kl", "reverse_kl", *(fused_sd.MixedKl(w) for w in (0.0, 0.4, 1.0))]
CASES += [*map(fused_sd.Jsd, BETAS), *map(fused_sd.SkewKl, WEIGHTS)]
pytestmark = [
    pytest.mark.kernels,
    pytest.mark.filterwarnings("ignore:.*encountered in.*:RuntimeWarning"),
]


def largest_error(found: Tensor, exact: Tensor) -> float:
    return float((found / exact - 1).abs().max())


def test_the_polynomials_are_as_exact_as_they_say():
    """In float64, so that their error is seen and not the rounding of fp32."""
    x = torch.linspace(-0.5, 0.5, 2001, dtype=torch.float64)
    x = x[x.abs() > 1e-3]
    assert largest_error(forms.excess_ratio.fn(x), (x.expm1() - x) / x) <= 6e-8
    x = torch.linspace(-0.25, -1e-6, 2001, dtype=torch.float64)
    assert largest_error(forms.log1p_ratio.fn(x), x.log1p() / x) <= 7e-8


def evaluate(halves, x: Tensor) -> Tensor:
    even, odd = halves
    value = sum(c * x ** (2 * i) for i, c in enumerate(even))
    return value + x * sum(c * x ** (2 * i) for i, c in enumerate(odd or ()))


def mixture_polynomials(divergence):
    """Both polynomials of a mixture, with what they stand for and their values at r = 0."""
    r = torch.linspace(-forms.NEAR, forms.NEAR, 2001, dtype=torch.float64)
    r = r[r.abs() > 2e-3]
    if isinstance(divergence, fused_sd.Jsd):
        w = divergence.beta
        _, curvature, slope = forms.jsd_parameter(w)
        change = w * torch.expm1(-r)
        m_over_s = change.log1p()
        term = -(1 - w) * m_over_s - w * (-r).exp() * (r + m_over_s)
        yield curvature, r, term / ((1 + change) * r**2), w * (1 - w) / 2
        yield slope, r, m_over_s / r, -w
    else:
        w = divergence.student_weight
        _, curvature, slope = forms.skew_parameter(w)
        change = w * torch.expm1(r)
        yield curvature, r, (change - change.log1p()) / r**2, w * w / 2
        yield slope, r, change / (1 + change) / r, w


@pytest.mark.parametrize(
    "divergence",
    [
        *map(fused_sd.Jsd, (0.1, 0.25, 0.5, 0.6, 0.9)),
        *map(fused_sd.SkewKl, (0.5, 0.7, 0.9, 0.999)),
    ],
    ids=str,
)
def test_the_polynomials_of_a_mixture(divergence):
    for halves, r, exact, at_zero in mixture_polynomials(divergence):
        assert largest_error(evaluate(halves, r), exact) <= 3e-8
        assert abs(halves[0][0] / at_zero - 1) <= 3e-8
        assert (exact / at_zero > 0).all()  # no sign changes, so the product keeps its digits
        assert (evaluate(halves, r) / at_zero > 0).all()


def test_equal_weights_need_half_of_the_coefficients():
    _, curvature, slope = forms.jsd_parameter(0.5)
    assert curvature[1] is None
    assert slope[0] == pytest.approx((-0.5,))


@pytest.mark.parametrize("beta", [0.1, 0.3, 0.5, 0.9])
def test_the_error_of_a_fast_logarithm_does_not_show(beta):
    """An ``lg2.approx`` that is off by its largest error everywhere, in one direction."""
    r = torch.logspace(0, 1.9, 500, dtype=torch.float64)
    r = torch.cat([-r, r])
    s, t = torch.exp(-(-r).clamp(min=0)), torch.exp(-r.clamp(min=0))  # the larger side is 1
    m = beta * t + (1 - beta) * s
    off = 2.0**-22 * torch.log(torch.tensor(2.0)).double()
    term = -(1 - beta) * s * (m / s).log() - beta * t * (m / t).log()
    assert (m * off / term).max() <= 7e-6
    assert (off / (m / s).log().abs()).max() <= 3e-6


@triton.jit
def one_block(
    log_s_ptr,
    log_t_ptr,
    term_ptr,
    dlog_s_ptr,
    parameter,
    DIVERGENCE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A divergence of each pair of entries."""
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    term, dlog_s = DIVERGENCE(tl.load(log_s_ptr + offs), tl.load(log_t_ptr + offs), parameter)
    tl.store(term_ptr + offs, term)
    tl.store(dlog_s_ptr + offs, dlog_s)


def evaluate_entries(divergence, log_s: Tensor, log_t: Tensor) -> tuple[Tensor, Tensor]:
    arguments = forms.program_arguments(divergence_term(divergence))
    term, dlog_s = torch.empty_like(log_s), torch.empty_like(log_s)
    one_block[(len(log_s) // 256,)](log_s, log_t, term, dlog_s, BLOCK=256, **arguments)
    return term.double(), dlog_s.double()


def exact_entries(divergence, log_s: Tensor, log_t: Tensor) -> tuple[Tensor, Tensor]:
    term = divergence_term(divergence)
    return term.function(log_s.double(), log_t.double(), term.parameter)


def borders(log_s: Tensor) -> Tensor:
    """Log-ratios at, just below and just above the borders between two forms."""
    at = torch.tensor([0.25, 0.5, 0.6931472, 1.0, 2.0**-10, 30.0, 86.0, 100.0])
    at = torch.cat([at, torch.nextafter(at, at * 0), torch.nextafter(at, at * 2)])
    return torch.cat([at, -at]).repeat(len(log_s) // (2 * len(at)) + 1)[: len(log_s)]


def closeness_to_an_end(divergence) -> float:
    """What the general forms lose to a mixture that nearly is one side."""
    parameter = divergence_term(divergence).parameter
    arguments = forms.program_arguments(divergence_term(divergence))
    if arguments["DIVERGENCE"] not in (forms.jsd, forms.skew_kl):
        return 0.0
    return 1e-6 / min(parameter, 1 - parameter)


@pytest.mark.parametrize("divergence", CASES, ids=str)
@pytest.mark.parametrize("size", [1e-5, 1e-3, 0.1, 0.5, 1.0, 5.0, "borders"])
def test_entries_keep_their_digits(divergence, size):
    """Log-probabilities between -1 and -8 are exact in fp32, and r is rounded once."""
    log_s = -1 - 7 * torch.rand(2048)
    r = borders(log_s) if size == "borders" else size * torch.randn(2048)
    log_t = torch.where(r > 0, log_s - r, log_s)  # the larger side stays where it is
    log_s = torch.where(r > 0, log_s, log_s + r)
    log_s, log_t = log_s.to(DEVICE), log_t.to(DEVICE)
    found, exact = (
        evaluate_entries(divergence, log_s, log_t),
        exact_entries(divergence, log_s, log_t),
    )
    assert (found[0] >= 0).all()
    bound = 2e-5 + closeness_to_an_end(divergence)
    for value, truth in zip(found, exact, strict=True):
        # of the smallest probability, whose exponential's argument is rounded, and of an entry
        log_size = torch.minimum(log_s, log_t).abs().double()
        error = (value - truth).abs() / (truth.abs() + 1e-30)
        assert (error <= bound + 2e-7 * log_size).all(), float(error.max())
        assert error.square().mean().sqrt() <= bound / 2
    if size != "borders":
        assert abs(float(found[0].sum() / exact[0].sum()) - 1) <= bound / 2  # no bias


@pytest.mark.parametrize("divergence", CASES, ids=str)
def test_entries_without_mass(divergence):
    """-inf on one side or both, far below fp32's smallest number, and near it.

    A KL with a weight of 0 in a mixed KL is NaN where it is infinite.
    """
    lowest = [-torch.inf, -1e30, -1e4, -110.0, -103.0, -88.0, -87.0]
    log_s = torch.tensor([*lowest, *[-2.0] * 7, *lowest, 0.0, *[-torch.inf] * 6])
    log_t = torch.tensor([*[-2.0] * 7, *lowest, *lowest, 0.0, -90.0, -80.0, -1e4, -5.0, -1e30, 0.0])
    log_s, log_t = (side.to(DEVICE).repeat(256)[:256] for side in (log_s, log_t))
    found, exact = (
        evaluate_entries(divergence, log_s, log_t),
        exact_entries(divergence, log_s, log_t),
    )
    for value, truth in zip(found, exact, strict=True):
        infinite = truth.isinf()
        assert torch.equal(value[infinite], truth[infinite])
        value, truth = (part[truth.isfinite()] for part in (value, truth))
        error = (value - truth).abs()
        assert (error <= 1e-30 + 3e-5 * truth.abs()).all(), float(error.max())


def test_every_divergence_has_a_function_and_a_parameter():
    for case in CASES:
        arguments = forms.program_arguments(divergence_term(case))
        assert set(arguments) == {"DIVERGENCE", "parameter"}
    assert {divergence_term(case).name for case in CASES} == set(DIVERGENCES)
