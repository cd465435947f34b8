"""What verl's worker makes of corrected and rejected tokens, micro-batches and several updates.

The worker is built from a recipe, on two processes under FSDP2.
"""

import pytest
import torch
from corrections import CASES, RATE, samples
from engine_batches import TEMPERATURE
from test_teachers import assert_weights, averaged, remains

from fused_sd import Evidence, rlsd_loss


def left_of(case):
    """The first process's remains."""
    both = remains()[0][case]
    for one in both:
        assert "error" not in one, one["error"]
    return both[0]


def loss_of(case):
    (loss,) = left_of(case)["metrics"]["loss"]
    return loss


def test_a_module_chooses_our_engine_where_no_variable_does():
    left = left_of("weights")
    assert left["engine"] == "TeachingEngine"
    assert left["vendor"] is None


@torch.no_grad()
def expected(case, token_loss):
    """The mean over counted tokens of weight times loss, in float64, with a live teacher."""
    model, total, count = remains()[1], 0.0, 0.0
    for sample in samples(CASES[case]):
        num = len(sample["responses"])
        sides = [
            model(input_ids=sample[name][None]).logits[0, -num - 1 : -1] / TEMPERATURE
            for name in ("input_ids", "teacher_input_ids")
        ]
        losses = token_loss(sample, *(side.log_softmax(-1) for side in sides))
        weights = sample.get("rollout_is_weights", torch.ones(num)).double()
        total += float((losses * weights * sample["loss_mask"]).sum())
        count += float(sample["loss_mask"].sum())
    return total / count


def reverse_kl(sample, own, shown):
    return (own.exp() * (own - shown)).sum(-1)


def rlsd(sample, own, shown):
    ids = sample["responses"]
    # log-probabilities as hidden states of an identity head: the library's own loss
    return rlsd_loss(
        own,
        torch.eye(own.shape[1], dtype=torch.float64),
        ids,
        sample["advantages"].double(),
        teacher_log_probs=shown.gather(-1, ids[:, None])[:, 0],
        old_log_probs=sample["old_log_probs"].double(),
        evidence=Evidence((0.2, 0.2), 0.5),
        ratio_clip=(0.2, 0.2),
        reduction="none",
    ).loss


LOSSES = {"weights": reverse_kl, "rejected": reverse_kl, "one at a time": reverse_kl}


@pytest.mark.parametrize("case, loss", [*LOSSES.items(), ("rejected, rlsd", rlsd)])
def test_the_loss_is_the_mean_of_the_weighted_losses_of_what_counts(case, loss):
    remains()[1].load_state_dict({k: v.double() for k, v in left_of(case)["before"].items()})
    assert loss_of(case) == pytest.approx(expected(case, loss), rel=1e-5)
    assert abs(loss_of(case)) > 0.01


def test_what_verl_rejects_teaches_nothing():
    """The first sample's micro-batch keeps no token, and does not fail."""
    left = left_of("rejected")
    assert left["metrics"]["grad_norm"][0] > 0
    assert_weights(left["after"], left_of("rejected, another response")["after"], atol=0)


@pytest.mark.parametrize("case", ["two at a time", "dynamic, small"])
def test_the_split_into_micro_batches_changes_nothing(case):
    one, other = left_of("one at a time"), left_of(case)
    assert loss_of(case) == pytest.approx(loss_of("one at a time"), rel=1e-5)
    assert other["metrics"]["grad_norm"] == pytest.approx(one["metrics"]["grad_norm"], rel=1e-4)
    assert_weights(other["after"], one["after"], atol=1e-5)


def test_a_teacher_follows_once_for_all_mini_batches_and_epochs():
    left = left_of("pace")
    assert len(left["metrics"]["loss"]) == 4, "two mini-batches, twice"
    before, after = left["before"], left["after"]
    assert_weights(left["teacher"], averaged(before, after, RATE), atol=1e-6)
    # four averages would be further along
    assert max(float((after[name] - before[name]).abs().max()) for name in before) > 1e-3
