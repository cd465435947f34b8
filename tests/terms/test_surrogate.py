"""The losses of the sampled token, by hand: where a ratio is clipped, and where a gradient ends."""

import math

import pytest
import torch
from closeness import assert_close

from fused_sd.terms.surrogate import Surrogate, sampled_kl, surrogate
from fused_sd.terms.weighting import MAX_LOG_RATIO

FLOAT = torch.float64


def term(settings, log_prob, old, advantages, **inputs):
    given = {"old_log_probs": old, "advantages": advantages, **inputs}
    tensors = {name: torch.tensor(values, dtype=FLOAT) for name, values in given.items()}
    return surrogate(Surrogate(**settings), torch.tensor(log_prob, dtype=FLOAT), tensors)


def test_a_ratio_is_clipped_only_where_that_makes_the_loss_larger():
    """Ratios of 2 and 1/2 with advantages of either sign, clipped to (0.75, 1.5)."""
    up, down = math.log(2), -math.log(2)
    found = term(
        {"ratio_clip": (0.25, 0.5)},
        [up - 3, up - 3, down - 3, down - 3],
        [-3.0] * 4,
        [1.0, -1.0, 1.0, -1.0],
    )
    assert_close(found.loss, torch.tensor([-1.5, 2.0, -0.5, 0.75], dtype=FLOAT), FLOAT)
    assert_close(found.dlog_prob, torch.tensor([0, 2.0, -0.5, 0], dtype=FLOAT), FLOAT)
    assert found.metrics["ratio_clip_fraction"].tolist() == [1, 0, 0, 1]
    assert_close(
        found.metrics["importance_ratio"], torch.tensor([2, 2, 0.5, 0.5], dtype=FLOAT), FLOAT
    )


def test_a_dual_clip_bounds_the_loss_of_negative_advantages_alone():
    found = term({"dual_clip": 3.0}, [-1.0, -1.0, -3.0], [-3.0] * 3, [-2.0, 2.0, -2.0])
    ratio = math.exp(2)
    assert_close(found.loss, torch.tensor([6.0, -2 * ratio, 2.0], dtype=FLOAT), FLOAT)
    assert_close(found.dlog_prob, torch.tensor([0, -2 * ratio, 2.0], dtype=FLOAT), FLOAT)


def test_a_gradient_ends_where_the_log_ratio_is_clamped():
    """At the clamp's bound the ratio still follows; beyond, loss and gradient are constants.

    The log-probabilities' size does not matter: the second pair is far from 0 and near each other.
    """
    bound = math.exp(MAX_LOG_RATIO)
    found = term(
        {}, [-1.0, -30.0, -1.0], [-1 - MAX_LOG_RATIO, -30.0, -2 - MAX_LOG_RATIO], [1.0] * 3
    )
    assert_close(found.loss, torch.tensor([-bound, -1, -bound], dtype=FLOAT), FLOAT)
    assert_close(found.dlog_prob, torch.tensor([-bound, -1, 0], dtype=FLOAT), FLOAT)


def test_a_kl_to_a_reference_is_added_with_its_coefficient():
    found = term(
        {"kl_coefficient": 0.5, "kl_estimator": "k2"},
        [-1.0],
        [-1.0],
        [2.0],
        teacher_log_probs=[-9.0],
        reference_log_probs=[-4.0],
    )
    assert found.loss.tolist() == [-2 + 0.5 * 4.5]  # the gap is 3
    assert found.dlog_prob.tolist() == [-2 + 0.5 * 3]
    k3 = math.exp(-3) + 3 - 1
    assert_close(found.metrics["reference_kl"], torch.tensor([k3], dtype=FLOAT), FLOAT)


def test_an_importance_cap_multiplies_loss_and_gradient():
    """The policy gradient's ratio of e is multiplied by the same ratio, cut at 2."""
    found = term({"importance_cap": 2.0}, [-1.0, -3.0], [-2.0, -2.0], [1.0, 1.0])
    expected = torch.tensor([-2 * math.e, -math.exp(-2)], dtype=FLOAT)
    assert_close(found.loss, expected, FLOAT)
    assert_close(found.dlog_prob, expected, FLOAT)


def test_without_old_log_probs_the_policy_is_the_one_that_sampled():
    given = {"advantages": torch.tensor([3.0])}
    found = surrogate(Surrogate(), torch.tensor([-5.0]), given)
    assert found.loss.tolist() == [-3.0]
    assert found.dlog_prob.tolist() == [-3.0]


@pytest.mark.parametrize(
    "estimator, value, derivative",
    [
        ("k1", 2.0 * -1.0, 2.0),
        ("k2", 2.0, 2.0),
        ("k3", math.exp(-2) + 2 - 1, 1 - math.exp(-2)),
    ],
)
def test_estimators_of_a_kl(estimator, value, derivative):
    log_prob, reference = torch.tensor([-1.0], dtype=FLOAT), torch.tensor([-3.0], dtype=FLOAT)
    kl, dkl = sampled_kl(log_prob, reference, estimator)
    assert_close(kl, torch.tensor([value], dtype=FLOAT), FLOAT)
    assert_close(dkl, torch.tensor([derivative], dtype=FLOAT), FLOAT)


def test_k3_is_constant_beyond_the_clamp_and_follows_at_its_bound():
    gaps = torch.tensor([-MAX_LOG_RATIO, -MAX_LOG_RATIO - 1], dtype=FLOAT)
    kl, dkl = sampled_kl(gaps, torch.zeros(2, dtype=FLOAT), "k3")
    bound = math.expm1(MAX_LOG_RATIO)
    assert_close(kl, torch.tensor([bound - MAX_LOG_RATIO] * 2, dtype=FLOAT), FLOAT)
    assert_close(dkl, torch.tensor([-bound, 0], dtype=FLOAT), FLOAT)


@pytest.mark.parametrize("name", ["kl", "k1_direct", "direct"])
def test_a_kl_whose_gradient_forgets_the_reference_is_refused(name):
    with pytest.raises(ValueError, match=r"does not depend on the reference.*'k2' or 'k3'"):
        Surrogate(kl_estimator=name)


def test_a_dual_clip_of_one_would_cut_all():
    with pytest.raises(ValueError, match="dual_clip must be above 1, got 1"):
        Surrogate(dual_clip=1.0)
