"""The fused policy losses against the arithmetic of each method's official code.

``METHODS`` is the catalogue: what a code computes, and the call that computes it here.
"""

import official_policies as official
import pytest
import torch
from official_batches import BATCHES, FLOAT, Batch, assert_same
from torch import Tensor

import fused_sd
from fused_sd import Evidence, EvidenceSchedule, LossOutput

GLOBAL_TOKENS = 37.0
AVERAGES = {
    "dapo": ("token_mean", {"num_tokens": GLOBAL_TOKENS}),
    "bnpo": ("token_mean", {}),
    "grpo": ("all_sequences_mean_token_mean", {}),
    "dr_grpo": ("constant_length", {"length": 12}),
}


def grpo_in_trl(batch: Batch, loss_type: str, **settings: object) -> LossOutput:
    mode, extra = AVERAGES[loss_type]
    weights = fused_sd.aggregation_weights(batch.mask, mode, dtype=FLOAT, **extra)
    return fused_sd.grpo_loss(
        *batch.policy, old_log_probs=batch.old, token_weights=weights, reduction="sum", **settings
    )


def exact_grpo_in_trl(batch: Batch, loss_type: str, **settings: object) -> Tensor:
    return official.grpo_trl(
        batch, loss_type=loss_type, num_tokens=GLOBAL_TOKENS, length=12, **settings
    )


def rlsd(batch: Batch, evidence: Evidence, **settings: object) -> LossOutput:
    return fused_sd.rlsd_loss(
        *batch.policy,
        teacher_hidden=batch.teacher_hidden,
        teacher_head=batch.teacher_head,
        old_log_probs=batch.old,
        evidence=evidence,
        **{"token_weights": batch.mask, **settings},
    )


def contrast(settings: official.Contrast) -> dict[str, object]:
    return {
        "temperature": settings.tau,
        "scale": settings.beta,
        "mix": settings.lam,
        "threshold": settings.delta,
        "clip": settings.bounds,
    }


def rlcsd(
    batch: Batch, settings: official.Contrast, correction: Tensor | None = None
) -> LossOutput:
    return fused_sd.rlcsd_loss(
        *batch.policy,
        batch.correct,
        batch.wrong,
        wrong_mask=batch.wrong_mask[:, None, :].expand_as(batch.wrong),
        token_weights=batch.mask,
        correction=correction,
        old_log_probs=batch.old,
        selected_weight=settings.eta,
        contrast=contrast(settings),
    )


def correction(batch: Batch) -> Tensor:
    """RLCSD's rollout correction; the engine has said nothing of tokens that do not count."""
    ratio = (batch.old - batch.rollout).exp().clamp(max=2)
    return torch.where(batch.mask != 0, ratio, 1)


def iw_opd(batch: Batch) -> LossOutput:
    """``-w A log_prob``: cross entropy with the advantages as weights."""
    with torch.no_grad():
        teacher = fused_sd.token_log_probs(
            *batch.teacher, batch.token_ids, token_weights=batch.mask
        ).log_probs
    advantages = fused_sd.iw_opd_advantages(teacher, batch.rollout, batch.mask)
    weights = fused_sd.aggregation_weights(batch.mask, "token_mean", dtype=FLOAT)
    return fused_sd.cross_entropy_loss(
        *batch.sampled, token_weights=advantages * weights, reduction="sum"
    )


METHODS = {
    # GRPO, arXiv 2402.03300
    "GRPO in verl, dual clip": (
        lambda b: official.grpo_verl(b, clip=(0.2, 0.28), dual=3.0),
        lambda b: fused_sd.grpo_loss(
            *b.policy,
            old_log_probs=b.old,
            ratio_clip=(0.2, 0.28),
            dual_clip=3.0,
            token_weights=b.mask,
        ),
    ),
    "GRPO in verl, a dual clip that is met": (
        lambda b: official.grpo_verl(b, clip=(0.2, 0.2), dual=1.3),
        lambda b: fused_sd.grpo_loss(
            *b.policy, old_log_probs=b.old, dual_clip=1.3, token_weights=b.mask
        ),
    ),
    **{
        f"GRPO in TRL, {loss_type}": (
            lambda b, kind=loss_type: exact_grpo_in_trl(b, kind),
            lambda b, kind=loss_type: grpo_in_trl(b, kind),
        )
        for loss_type in AVERAGES
    },
    "GRPO in TRL, delta": (
        lambda b: exact_grpo_in_trl(b, "bnpo", clip=(0.2, 0.25), delta=1.3),
        lambda b: grpo_in_trl(b, "bnpo", ratio_clip=(0.2, 0.25), dual_clip=1.3),
    ),
    "GRPO in TRL, beta": (
        lambda b: exact_grpo_in_trl(b, "grpo", beta=0.1),
        lambda b: grpo_in_trl(b, "grpo", reference_log_probs=b.reference, kl_coefficient=0.1),
    ),
    # RLSD, arXiv 2604.03128
    "RLSD, official code": (official.rlsd, lambda b: rlsd(b, Evidence())),
    "RLSD, script": (
        lambda b: official.rlsd(b, mix=0.35, evidence_clip=0.1, dual=1.35),
        lambda b: rlsd(b, Evidence((0.1, 0.1), 0.35), dual_clip=1.35),
    ),
    "RLSD in ms-swift and SDPG": (
        lambda b: official.rlsd(b, from_old=True),
        lambda b: rlsd(b, Evidence(log_prob="old")),
    ),
    "RLSD, paper's equation 15": (
        lambda b: official.rlsd(b, mix=1.0),
        lambda b: rlsd(b, Evidence(mix=1.0)),
    ),
    "RLSD without evidence is GRPO": (
        lambda b: official.grpo_verl(b, clip=(0.2, 0.28), dual=3.0),
        lambda b: rlsd(b, Evidence(mix=0.0)),
    ),
    # RLCSD, arXiv 2606.11709
    "RLCSD, YAML": (
        lambda b: official.rlcsd(b, official.RLCSD_YAML),
        lambda b: rlcsd(b, official.RLCSD_YAML),
    ),
    "RLCSD, code's own defaults": (
        lambda b: official.rlcsd(b, official.RLCSD_CODE),
        lambda b: rlcsd(b, official.RLCSD_CODE),
    ),
    "RLCSD, another weight of the selected": (
        lambda b: official.rlcsd(b, official.RLCSD_YAML._replace(eta=0.4, delta=0.45)),
        lambda b: rlcsd(b, official.RLCSD_YAML._replace(eta=0.4, delta=0.45)),
    ),
    "RLCSD with the rollout's correction": (
        lambda b: official.rlcsd(
            b, official.RLCSD_YAML, (b.old - b.rollout).exp().clamp(max=2)
        ),
        lambda b: rlcsd(b, official.RLCSD_YAML, correction(b)),
    ),
    # IW-OPD, arXiv 2606.22600
    "IW-OPD": (official.iw_opd, iw_opd),
}  # fmt: skip


@pytest.mark.parametrize("kind", BATCHES)
@pytest.mark.parametrize("method", METHODS)
def test_a_fused_policy_loss_is_the_official_codes(method, kind):
    exact, fused = METHODS[method]
    batch = BATCHES[kind]()
    assert_same(fused(batch).loss, exact(batch), batch, batch)


@pytest.mark.parametrize("method", METHODS)
def test_what_the_mask_hides_does_not_matter(method):
    exact, fused = METHODS[method]
    plain = BATCHES["ragged"]()
    batch = plain.poisoned()
    assert_same(fused(batch).loss, exact(plain), batch, plain)


@pytest.mark.parametrize("advantage", [0.0, -0.0])
@pytest.mark.parametrize("method", METHODS)
def test_an_advantage_of_zero(method, advantage):
    exact, fused = METHODS[method]
    batch = BATCHES["ragged"]()
    advantages = batch.advantages.clone()
    advantages[::2] = advantage
    batch = batch.with_(advantages=advantages)
    assert_same(fused(batch).loss, exact(batch), batch, batch)


@pytest.mark.parametrize("warmup", [0, 1, 4])
@pytest.mark.parametrize("decay", [0, 6])
def test_rlsds_lambda_is_that_of_the_official_code_at_each_update(warmup, decay):
    schedule = EvidenceSchedule(0.5, warmup, decay_steps=decay)
    for step in range(1, 15):  # the official code's first update is its step 1
        assert schedule.value == pytest.approx(official.rlsd_mix(step, 0.5, warmup, decay))
        schedule.step()


def test_rlcsds_lambda_of_rlsd_begins_at_the_peak():
    schedule = EvidenceSchedule(0.5, decay_steps=50, first_step=0)
    for step in range(1, 60):
        assert schedule.value == pytest.approx(official.rlcsd_mix(step, 0.5, 50))
        schedule.step()
