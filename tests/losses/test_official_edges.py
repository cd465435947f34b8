"""Where official arithmetic has corners: exact clips, whole vocabularies, any mask and settings."""

import math

import official
import official_policies
import pytest
import torch
from closeness import assert_close
from official_batches import BATCHES, VOCAB, Batch, assert_same, make_batch
from torch import Tensor

pytest.importorskip("hypothesis")
from hypothesis import given, settings
from hypothesis import strategies as st

import fused_sd
from fused_sd import Evidence, StudentTopK, TeacherTopK
from fused_sd.checks import tensors

K = 6


def hit_and_missed(where: Tensor) -> bool:
    return bool(where.any()) and not bool(where.all())


def test_the_batches_reach_both_sides_of_every_corner():
    batch = BATCHES["every token"]()
    own = batch.log_prob(batch.student_logits())
    ratio = (own - batch.old).exp()
    assert hit_and_missed(batch.advantages > 0)
    for corner in (
        ratio < 0.8,
        ratio > 1.2,
        (ratio > 1.3) & (batch.advantages < 0),
        ratio > 2,
        (batch.old - batch.rollout).exp() > 2,
    ):
        assert hit_and_missed(corner), corner
    weight = (batch.log_prob(batch.teacher_logits()) - own).exp()
    assert hit_and_missed(weight > 1.2)
    assert hit_and_missed(weight < 0.8)
    pooled = batch.wrong.logsumexp(-1) - math.log(3)
    residual = 0.5 * torch.tanh((batch.correct - pooled) / 0.02)
    assert hit_and_missed(residual.abs() > 0.45)
    assert hit_and_missed((batch.advantages + residual) * batch.advantages < 0)
    sides = batch.student_logits().log_softmax(-1), batch.teacher_logits().log_softmax(-1)
    assert hit_and_missed(official.kl(sides[1], sides[0]) > 0.05)
    peaked = BATCHES["peaked"]()
    log_mass = peaked.student_logits().log_softmax(-1).topk(K, -1).values.logsumexp(-1)
    assert hit_and_missed(log_mass > -1e-7)


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_a_ratio_exactly_at_its_clip_follows_the_policy(sign):
    batch = BATCHES["ragged"]()
    batch = batch.with_(advantages=batch.advantages.abs() * sign)
    own = batch.log_prob(batch.student_logits())
    exact = official.token_mean(
        official_policies.dual_clipped(own, own.detach(), batch.advantages, (0.0, 0.0)), batch.mask
    )
    output = fused_sd.grpo_loss(
        *batch.policy, ratio_clip=(0.0, 0.0), dual_clip=3.0, token_weights=batch.mask
    )
    assert_same(output.loss, exact, batch, batch)


@pytest.mark.parametrize("gap", [-30.0, 30.0])
def test_a_log_ratio_beyond_20_is_flat_in_verl_and_here(gap, monkeypatch):
    # the sums are compared, of log-probabilities that no policy has
    monkeypatch.setattr(tensors, "LARGEST_LOG_PROB", 30.0)
    batch = BATCHES["ragged"]()
    own = batch.log_prob(batch.student_logits())
    old = torch.where(torch.arange(5) % 2 == 0, own.detach() + gap, batch.old)
    batch = batch.with_(old=old)
    exact = official_policies.grpo_verl(batch, clip=(0.2, 0.2), dual=3.0)
    output = fused_sd.grpo_loss(
        *batch.policy, old_log_probs=batch.old, dual_clip=3.0, token_weights=batch.mask
    )
    assert_same(output.loss, exact, batch, batch)


def test_evidence_of_any_size_is_clipped_and_of_no_sign_is_one():
    batch = BATCHES["every token"]()
    old = batch.old - 60
    teacher = old + torch.tensor([-60.0, -1.0, 0.0, 1.0, 60.0]).double()
    advantages = batch.advantages.clone()
    advantages[0] = 0.0
    output = fused_sd.rlsd_loss(
        batch.hidden,
        batch.head,
        batch.token_ids,
        advantages,
        teacher_log_probs=teacher,
        old_log_probs=old,
        evidence=Evidence((0.2, 0.3), log_prob="old"),
        metrics=("evidence_weight",),
    )
    weight = output.metrics["evidence_weight"]
    assert (weight[0] == 1).all()
    expected = torch.tensor([0.8, 0.8, 1.0, 1.3, 1.3]).double()
    for row, sign in zip(weight[1:], advantages[1:, 0].sign(), strict=True):
        assert_close(row, expected if sign > 0 else expected.flip(0), torch.float32)


FULL_SUPPORT = {
    "SDPO, exact tail": lambda b: fused_sd.sdpo_loss(*b.sides, top_k=VOCAB, token_weights=b.mask),
    "SDPO, renormalised": lambda b: fused_sd.sdpo_loss(
        *b.sides, top_k=VOCAB, add_tail=False, token_weights=b.mask
    ),
    "OPSD": lambda b: fused_sd.opsd_loss(
        *b.sides, beta=0.5, entry_clip=None, top_k=VOCAB, token_weights=b.mask
    ),
    "SDFT": lambda b: fused_sd.sdft_loss(*b.sides, alpha=0.5, top_k=VOCAB, token_weights=b.mask),
}


@pytest.mark.parametrize("method", FULL_SUPPORT)
@pytest.mark.parametrize("kind", ["ragged", "peaked", "one token", "nothing"])
def test_a_top_k_of_the_whole_vocabulary_is_no_truncation(method, kind):
    batch = BATCHES[kind]()
    assert_same(FULL_SUPPORT[method](batch).loss, official.opsd(batch, beta=0.5), batch, batch)


@pytest.mark.parametrize("kind", ["ragged", "peaked"])
def test_sdpos_clamped_tails_cancel_when_nothing_is_outside(kind):
    batch = BATCHES[kind]()
    output = fused_sd.sdpo_loss(
        *batch.sides, top_k=VOCAB, tail_floor=1e-7, token_weights=batch.mask
    )
    exact = official.sdpo(batch, alpha=0.5, top_k=VOCAB, cap=None, tis_cap=None)
    assert_same(output.loss, exact, batch, batch)


@pytest.mark.parametrize(
    "loss",
    [
        lambda b, k: fused_sd.sdpo_loss(*b.sides, top_k=k),
        lambda b, k: fused_sd.sd_zero_loss(*b.sides, top_k=k),
        lambda b, k: fused_sd.opsd_loss(*b.sides, top_k=k),
        lambda b, k: fused_sd.sdft_loss(*b.sides, top_k=k),
    ],
)
def test_a_top_k_beyond_the_vocabulary_is_refused(loss):
    message = rf"top_k, .*TopK, must be at most .*{VOCAB}, got {VOCAB + 1}"
    with pytest.raises(ValueError, match=message):
        loss(BATCHES["one token"](), VOCAB + 1)


def test_rlcsd_keeps_a_row_without_wrong_hints_as_grpo_and_drops_it_by_its_weight():
    batch = BATCHES["every token"]()
    valid = batch.wrong_mask.clone()
    valid[2] = False
    batch = Batch(**{**vars(batch), "wrong_mask": valid})
    run = {
        "wrong_mask": valid[:, None, :].expand_as(batch.wrong),
        "old_log_probs": batch.old,
    }
    tensors = *batch.policy, batch.correct, batch.wrong
    shaped = fused_sd.rlcsd_advantages(*tensors[3:], wrong_mask=run["wrong_mask"])
    assert not shaped.selected[2].any()
    assert torch.equal(shaped.advantages[2], batch.advantages[2])
    # the official code removes such a sample with its GRPO term; its arithmetic alone would select
    # every token of it, an empty logsumexp being -inf
    kept = batch.mask.clone()
    kept[2] = 0
    dropped = Batch(**{**vars(batch), "mask": kept})
    exact = official_policies.rlcsd(dropped, official_policies.RLCSD_YAML)
    assert_same(
        fused_sd.rlcsd_loss(*tensors, token_weights=kept, **run).loss, exact, batch, dropped
    )
    # with nothing of the row outside, both agree on the other rows; within, it counts as GRPO
    whole = fused_sd.rlcsd_loss(*tensors, token_weights=batch.mask, **run).loss
    assert whole.isfinite()
    assert not torch.equal(whole, exact)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.integers(0, 2**31), st.data())
def test_any_mask_top_k_and_weight_of_sdpo_and_sd_zero(seed, data):
    torch.manual_seed(seed)
    num_rows = data.draw(st.integers(1, 4))
    bits = st.lists(st.integers(0, 1), min_size=4, max_size=4)
    batch = make_batch(data.draw(st.lists(bits, min_size=num_rows, max_size=num_rows)))
    top_k = data.draw(st.integers(1, VOCAB - 1))
    share = data.draw(st.floats(0.05, 0.95))
    output = fused_sd.divergence_loss(
        *batch.sides,
        divergence=fused_sd.Jsd(share),
        support=StudentTopK(top_k),
        tail_floor=1e-7,
        token_weights=batch.mask,
        reduction="mean",
    )
    exact = official.sdpo(batch, alpha=share, top_k=top_k, cap=None, tis_cap=None)
    assert_same(output.loss, exact, batch, batch)
    output = fused_sd.divergence_loss(
        *batch.sides,
        divergence=fused_sd.MixedKl(share),
        support=TeacherTopK(top_k + 1),
        remainder="renormalize",
        token_weights=batch.mask / 9,
        reduction="sum",
    )
    exact = official.sd_zero(batch, top_k=top_k + 1, num_tokens=9.0, forward_weight=share)
    assert_same(output.loss, exact, batch, batch)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.integers(0, 2**31), st.data())
def test_any_mask_clip_and_mix_of_rlsd(seed, data):
    torch.manual_seed(seed)
    num_rows = data.draw(st.integers(1, 4))
    bits = st.lists(st.integers(0, 1), min_size=4, max_size=4)
    batch = make_batch(data.draw(st.lists(bits, min_size=num_rows, max_size=num_rows)))
    clip, low, mix = (data.draw(st.floats(0.02, 0.9)) for _ in range(3))
    dual, from_old = data.draw(st.floats(1.05, 4.0)), data.draw(st.booleans())
    exact = official_policies.rlsd(
        batch,
        mix=mix,
        evidence_clip=clip,
        ratio_clip=(low, 0.28),
        dual=dual,
        from_old=from_old,
    )
    output = fused_sd.rlsd_loss(
        *batch.policy,
        teacher_hidden=batch.teacher_hidden,
        teacher_head=batch.teacher_head,
        old_log_probs=batch.old,
        evidence=Evidence((clip, clip), mix, "old" if from_old else "current"),
        ratio_clip=(low, 0.28),
        dual_clip=dual,
        token_weights=batch.mask,
    )
    assert_same(output.loss, exact, batch, batch)
