"""Weights: each trainer's average as a vector, importance, advantages."""

import pytest
import torch
from closeness import assert_close

import fused_sd
from fused_sd import reference
from fused_sd.terms.weighting import Aggregation, capped_ratio

MASKS = {
    "ragged": [[1, 1, 1, 0], [1, 0, 0, 0], [1, 1, 1, 1]],
    "an empty sequence": [[1, 1, 0, 0], [0, 0, 0, 0], [0, 1, 1, 1]],
    "nothing": [[0, 0, 0, 0]] * 3,
}


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("mode", Aggregation.__args__)
def test_aggregation_weights_are_the_trainers_averages(mask, mode):
    mask = torch.tensor(MASKS[mask], dtype=torch.float64)
    token_loss = torch.rand(3, 4, dtype=torch.float64)
    extra = {"length": 5.0} if mode == "constant_length" else {}
    weights = fused_sd.aggregation_weights(mask, mode, dtype=torch.float64, **extra)
    exact = getattr(reference, mode)(token_loss, mask, **extra)
    assert_close((weights * token_loss).sum(), exact, torch.float64)
    assert (weights[mask == 0] == 0).all()


def test_a_global_token_mean_takes_its_divisor():
    mask = torch.tensor(MASKS["ragged"])
    weights = fused_sd.aggregation_weights(mask, "token_mean", num_tokens=40)
    assert_close(weights, mask.double() / 40, torch.float32)


def test_skipped_tokens_are_the_first_that_count():
    mask = torch.tensor([[0, 1, 1, 1, 1], [1, 1, 0, 0, 0]])
    skipped = fused_sd.skip_first_tokens(mask, 2)
    assert skipped.tolist() == [[0, 0, 0, 1, 1], [0, 0, 0, 0, 0]]


def test_iw_opd_advantages_equal_the_reference():
    b, a = (-torch.rand(2, 3, 6, dtype=torch.float64) * 3).unbind(0)
    mask = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0], [0, 0, 0, 0, 0, 0]])
    b[1, 4] = -torch.inf  # behind the mask
    advantages = fused_sd.iw_opd_advantages(b, a, mask)
    current = -torch.rand(3, 6, dtype=torch.float64)
    exact = reference.iw_opd(current, b, a, mask)
    assert_close(torch.where(mask != 0, -advantages * current, 0), exact, torch.float64)
    b[0, 0] = -torch.inf
    with pytest.raises(ValueError, match="teacher_log_probs must be finite"):
        fused_sd.iw_opd_advantages(b, a, mask)


def test_rlcsd_keeps_the_sign_of_an_advantage_and_tokens_without_a_wrong_hint():
    advantages = torch.tensor([0.1, -0.1, 0.0, 0.1], dtype=torch.float64)
    correct = torch.tensor([-5.0, -0.1, -0.1, -1.0], dtype=torch.float64)
    wrong = torch.tensor([[-0.1], [-5.0], [-5.0], [-1.0]], dtype=torch.float64)
    mask = torch.tensor([[True], [True], [True], [False]])
    shaped = fused_sd.rlcsd_advantages(advantages, correct, wrong, wrong_mask=mask)
    assert shaped.advantages.tolist() == [0.0, 0.0, 0.0, 0.1]
    assert shaped.selected.tolist() == [True, True, True, False]
    assert shaped.evidence[3] == 0


def test_one_token_and_one_sequence_are_divided_by_one():
    """The divisors are kept from 0, and from nothing else."""
    one = torch.tensor([[0, 1, 0]])
    for mode in Aggregation.__args__:
        extra = {"length": 1.0} if mode == "constant_length" else {}
        assert fused_sd.aggregation_weights(one, mode, **extra).tolist() == [[0.0, 1.0, 0.0]], mode
    among_empty = torch.tensor([[0, 0, 0], [1, 1, 0]])
    summed = fused_sd.aggregation_weights(among_empty, "sequence_mean_token_sum")
    assert summed.tolist() == [[0, 0, 0], [1, 1, 0]]
    averaged = fused_sd.aggregation_weights(among_empty, "sequence_mean_token_mean")
    assert averaged.tolist() == [[0, 0, 0], [0.5, 0.5, 0]]


def test_a_divisor_may_be_a_tensor():
    """A sum over ranks is one; to read it would wait for the device."""
    mask = torch.tensor(MASKS["ragged"])
    weights = fused_sd.aggregation_weights(mask, "token_mean", num_tokens=torch.tensor(16))
    assert torch.equal(weights, mask / 16)


def test_no_token_is_skipped_where_none_is_asked_for():
    mask = torch.tensor([[0, 1, 1], [1, 0, 1]])
    assert torch.equal(fused_sd.skip_first_tokens(mask, 0), mask)


def test_a_ratio_at_its_cap_is_not_cut():
    log_probs = torch.tensor([-3.0, -2.0])
    ratio, capped = capped_ratio(log_probs, torch.tensor([-3.0, -2.5]), 1.0)
    assert ratio.tolist() == [1.0, 1.0]
    assert capped.tolist() == [0.0, 1.0]


def test_iw_opd_weighs_small_gaps_as_it_weighs_large_ones():
    """The weights depend on the gaps' shares of their sum alone, here 1/2, 1/4 and 1/4."""
    for scale in (8.0, 0.125):
        gaps = torch.tensor([[2.0, 0.0, -1.0, 1.0]]) * scale
        found = fused_sd.iw_opd_advantages(gaps, torch.zeros(1, 4), torch.ones(1, 4), gamma=1.0)
        assert found.tolist() == [[4 * scale, 0, -1.5 * scale, 1.25 * scale]]


def test_rlcsd_pools_the_wrong_hints_that_are_there():
    """``e = b_correct - (logsumexp over the two hints that are there - log 2)``, by hand."""
    wrong = torch.log(torch.tensor([[0.5, 0.25, 0.9]], dtype=torch.float64))
    correct = torch.log(torch.tensor([0.375], dtype=torch.float64)) + 0.01
    mask = torch.tensor([[True, True, False]])
    ones = torch.ones(1, dtype=torch.float64)
    shaped = fused_sd.rlcsd_advantages(ones, correct, wrong, wrong_mask=mask)
    residual = 0.5 * torch.tanh(torch.tensor(0.01 / 0.02, dtype=torch.float64))
    assert_close(shaped.evidence, ones * 0.01, torch.float64)
    assert_close(shaped.advantages, ones + residual, torch.float64)


def test_rlcsd_cuts_the_residual_at_its_bounds():
    advantages = torch.tensor([1.0, 1.0])
    correct, wrong = torch.tensor([-1.0, -9.0]), torch.tensor([[-9.0], [-1.0]])
    shaped = fused_sd.rlcsd_advantages(advantages, correct, wrong, clip=(-0.25, 0.125))
    assert shaped.advantages.tolist() == [1.125, 0.75]
