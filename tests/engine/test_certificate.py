"""The numbers of a certificate, by hand."""

import pytest
import torch

from fused_sd.engine.certificate import (
    SUM_ROUNDING,
    TOLERANCE,
    GradientCertificate,
    checked_tolerance,
    mean_row,
    radius,
    rounding,
    underflow,
)
from fused_sd.head.lm_head import LMHead

# its mean row is (1, 0), the row (4, -4) the farthest from it and the longest
WEIGHT = torch.tensor([[4.0, -4.0], [0.0, 4.0], [0.0, 0.0], [0.0, 0.0]])


def test_a_head_is_as_wide_as_its_farthest_row():
    farthest, longest = radius(LMHead(WEIGHT))
    assert farthest == 5.0
    assert longest == pytest.approx(32**0.5)


def test_padding_is_no_row():
    padded = torch.cat([WEIGHT, torch.full((2, 2), 100.0)])
    farthest, longest = radius(LMHead(padded, valid_vocab=4))
    assert (farthest, longest) == (5.0, pytest.approx(32**0.5))


def test_a_head_of_16_bits_has_its_mean_in_32():
    rows = torch.tensor([[1.0], [1.0078125], [1.0], [1.0]], dtype=torch.bfloat16)
    mean = mean_row(rows)
    assert mean.dtype == torch.float32
    assert mean.tolist() == [1.001953125]  # of which bf16 knows 1
    assert mean_row(rows[:0]).tolist() == [0.0]
    assert mean_row(rows[:0]).dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_rounding_is_that_of_the_sums_and_of_the_result(dtype):
    head = LMHead(WEIGHT.to(dtype))
    wide = torch.finfo(torch.promote_types(dtype, torch.float32))
    own = torch.finfo(dtype)
    assert rounding(head) == pytest.approx(SUM_ROUNDING * 2 * wide.eps + own.eps)
    # 4 products of a value below the smallest, with rows of length 6 and below, and 2 results
    exact = wide.smallest_normal * wide.eps * 4 * 7 + own.smallest_normal * own.eps * 2**0.5
    assert underflow(head, torch.tensor(6.0, dtype=torch.float64)) == pytest.approx(exact)


def test_a_bound_is_of_what_is_dropped_and_of_rounding():
    dropped, norm = torch.tensor([0.5, 0.0, 0.0]), torch.tensor([8.0, 8.0, 0.0])
    flags = torch.zeros(3, dtype=torch.bool)
    certificate = GradientCertificate(flags.long(), flags, dropped, norm)
    head = LMHead(WEIGHT)
    bound = certificate.hidden_bound(WEIGHT)
    of_rounding = 8 * 32**0.5 * rounding(head)
    assert bound.tolist() == pytest.approx([2.5 + of_rounding, of_rounding, 0.0])
    assert certificate.dropped_share == 0.5 / 16
    nothing = GradientCertificate(flags, flags, dropped * 0, norm * 0)
    assert nothing.dropped_share == 0


def test_a_tolerance_belongs_to_a_gradient_that_may_be_sparse():
    assert checked_tolerance("dense", None) is None
    assert checked_tolerance("sparse", None) == checked_tolerance("auto", None) == TOLERANCE
    assert checked_tolerance("sparse", 0.5) == 0.5
    for gradient, tolerance, rule in [
        ("dense", 0.5, "come with gradient='sparse' or 'auto'"),
        ("sparse", 1.0, "be below 1, got 1.0"),
        ("auto", 0.0, "above 0"),
        ("thin", None, "gradient must be"),
    ]:
        with pytest.raises(ValueError, match=rule):
            checked_tolerance(gradient, tolerance)
