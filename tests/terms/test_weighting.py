"""Weights: each trainer's average as a vector, importance, advantages."""

import pytest
import torch
from closeness import assert_close

import fused_sd
from fused_sd import reference
from fused_sd.terms.weighting import Aggregation

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
