"""The gradient of a softmax whose normaliser is wider than its logits, by hand."""

import math

import pytest
import torch

from fused_sd.torch_kernels.rows import softmax_gradient_, without_rounding

LARGE = 2.0**24  # above it fp32 knows even numbers alone


def test_what_rounding_takes_from_a_normaliser_the_other_numbers_make_up_for():
    """``exp(x) (3 + 2 x)`` at x = y - 1 is ``exp(y) (1 + 2 y) / e``."""
    normalizer = torch.tensor([LARGE + 1], dtype=torch.float64)
    constant, slope = torch.tensor([3.0]), torch.tensor([2.0])
    rounded, factor, tilt = without_rounding(normalizer, constant, slope, torch.float32)
    assert rounded.tolist() == [LARGE]
    assert factor.tolist() == pytest.approx([1 / math.e])
    assert tilt.tolist() == pytest.approx([2 / math.e])
    rounded, factor, tilt = without_rounding(normalizer, constant, None, torch.float32)
    assert factor.tolist() == pytest.approx([3 / math.e])
    assert tilt is None


@pytest.mark.parametrize("slope", [None, 2.0])
def test_a_gradient_is_that_of_the_exact_normaliser(slope):
    logits = torch.tensor([[LARGE, LARGE - 2, -torch.inf]])
    normalizer = torch.tensor([LARGE + 1], dtype=torch.float64)
    tilt = None if slope is None else torch.tensor([slope])
    out = torch.empty_like(logits)
    softmax_gradient_(logits, normalizer, torch.tensor([3.0]), tilt, None, out)
    expected = [math.exp(x) * (3 + (slope or 0) * x) for x in (-1.0, -3.0)] + [0.0]
    assert out[0].tolist() == pytest.approx(expected)
