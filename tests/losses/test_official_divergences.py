"""The fused divergences against the arithmetic of each method's official code: loss and gradient.

``METHODS`` is the catalogue: what a code computes, and the call that computes it here.
"""

import official
import pytest
import torch
from official_batches import BATCHES, FLOAT, Batch, assert_same
from torch import Tensor

import fused_sd
from fused_sd import ImportanceCap, Jsd, LossOutput, UnionTopK

K = 6
GLOBAL_TOKENS = 37.0  # of all micro-batches and devices


def average(mask: Tensor, mode: str = "token_mean", **settings: float) -> Tensor:
    return fused_sd.aggregation_weights(mask, mode, dtype=FLOAT, **settings)


def times(weights: Tensor, factor: Tensor) -> Tensor:
    """A factor on the weights of tokens that count; the others may hold anything."""
    return torch.where(weights != 0, weights * factor, 0)


def truncated(batch: Batch, cap: float = 2.0) -> Tensor:
    """The rollout correction: the trainer's against the sampling engine's log-probabilities."""
    return (batch.old - batch.rollout).exp().clamp(max=cap)


def sdpo(batch: Batch, **settings: object) -> LossOutput:
    mask = batch.mask * batch.taught[:, None]
    return fused_sd.sdpo_loss(
        *batch.sides,
        token_ids=batch.token_ids,
        old_log_probs=batch.old,
        token_weights=times(average(mask), truncated(batch)),
        reduction="sum",
        **settings,
    )


def sdpo_sampled(batch: Batch) -> LossOutput:
    return fused_sd.sampled_kl_loss(
        *batch.sampled,
        teacher_hidden=batch.teacher_hidden,
        teacher_head=batch.teacher_head,
        importance=ImportanceCap(batch.old, 2.0),
        token_weights=average(batch.mask * batch.taught[:, None]),
        reduction="sum",
    )


def trl(loss: object, batch: Batch, **settings: object) -> LossOutput:
    weights = average(batch.mask, "all_sequences_mean_token_mean")
    return loss(
        *batch.sides,
        token_ids=batch.token_ids,
        token_weights=weights,
        reduction="sum",
        **settings,
    )


def sd_zero(batch: Batch, **settings: object) -> LossOutput:
    weights = average(batch.mask, num_tokens=GLOBAL_TOKENS)
    return fused_sd.sd_zero_loss(*batch.sides, token_weights=weights, reduction="sum", **settings)


def self_revision_training(batch: Batch) -> LossOutput:
    weights = average(second_half(batch)) + average(batch.mask)
    return fused_sd.cross_entropy_loss(*batch.sampled, token_weights=weights, reduction="sum")


def second_half(batch: Batch) -> Tensor:
    """Where the revision stands in an assistant turn that begins with the first attempt."""
    return batch.mask * (torch.arange(batch.mask.shape[1]) >= batch.mask.shape[1] // 2)


def sdft(batch: Batch) -> LossOutput:
    mask = fused_sd.skip_first_tokens(batch.mask, 3)
    within = average(mask, "all_sequences_mean_token_mean") * len(mask)
    weight = times(within, truncated(batch)).sum(-1, keepdim=True)  # a sequence's mean ratio
    weights = average(mask, "all_sequences_mean_token_mean") * weight
    return fused_sd.sdft_loss(*batch.sides, token_weights=weights, reduction="sum")


def masked(loss: object, batch: Batch, **settings: object) -> LossOutput:
    """With the mask alone: the named losses' own mean over its tokens."""
    return loss(*batch.sides, token_weights=batch.mask, **settings)


def served(batch: Batch, **settings: object) -> LossOutput:
    log_probs, ids = official.served(batch, K)
    return fused_sd.topk_divergence_loss(
        batch.hidden,
        batch.head,
        ids,
        log_probs,
        token_weights=batch.mask,
        reduction="mean",
        **settings,
    )


METHODS = {
    # SDPO, arXiv 2601.20802
    **{
        f"SDPO, official configuration with alpha {alpha}": (
            lambda b, a=alpha: official.sdpo(b, alpha=a, top_k=K),
            lambda b, a=alpha: sdpo(b, alpha=a, top_k=K, tail_floor=1e-7),
        )
        for alpha in (0.0, 0.5, 1.0)
    },
    "SDPO, full logits": (
        lambda b: official.sdpo(b, alpha=1.0, top_k=None),
        lambda b: sdpo(b, alpha=1.0, top_k=None),
    ),
    "SDPO, top-k renormalised": (
        lambda b: official.sdpo(b, alpha=0.5, top_k=K, add_tail=False),
        lambda b: sdpo(b, alpha=0.5, top_k=K, add_tail=False),
    ),
    "SDPO, at the rollout's temperature, without ratios": (
        lambda b: official.sdpo(b, alpha=0.5, top_k=K, cap=None, tis_cap=None, temperature=0.7),
        lambda b: fused_sd.sdpo_loss(
            *b.sides,
            top_k=K,
            tail_floor=1e-7,
            temperature=0.7,
            token_weights=b.mask * b.taught[:, None],
        ),
    ),
    "SDPO, sampled token": (official.sdpo_sampled, sdpo_sampled),
    "SDPO in TRL, topk_logits": (
        lambda b: official.trl_student_top_k(b, alpha=1.0, top_k=K),
        lambda b: trl(
            fused_sd.sdpo_loss, b, alpha=1.0, top_k=K, add_tail=False, old_log_probs=b.old
        ),
    ),
    # SD-Zero, arXiv 2604.12002
    "SD-Zero, official code": (
        lambda b: official.sd_zero(b, top_k=K, num_tokens=GLOBAL_TOKENS),
        lambda b: sd_zero(b, top_k=K),
    ),
    "SD-Zero, official code, three quarters forward": (
        lambda b: official.sd_zero(b, top_k=K, num_tokens=GLOBAL_TOKENS, forward_weight=0.75),
        lambda b: sd_zero(b, top_k=K, forward_weight=0.75),
    ),
    "SD-Zero, paper": (
        official.sd_zero_paper,
        lambda b: masked(fused_sd.sd_zero_loss, b, variant="paper"),
    ),
    "SD-Zero, phase 1 (SRT)": (
        lambda b: official.self_revision_training(b, second_half(b)),
        self_revision_training,
    ),
    # OPSD, arXiv 2601.18734
    "OPSD, version 3": (
        lambda b: official.opsd(b, entry_clip=0.05),
        lambda b: masked(fused_sd.opsd_loss, b),
    ),
    "OPSD, version 3 with a clipped JSD": (
        lambda b: official.opsd(b, beta=0.5, entry_clip=0.01),
        lambda b: masked(fused_sd.opsd_loss, b, beta=0.5, entry_clip=0.01),
    ),
    "OPSD, code of March 2026": (
        lambda b: official.opsd(b, beta=0.5, top_k=K, temperature=1.1),
        lambda b: masked(
            fused_sd.opsd_loss, b, beta=0.5, entry_clip=None, top_k=K, temperature=1.1
        ),
    ),
    "OPSD as RLCSD runs it": (
        lambda b: official.opsd(b, entry_clip=0.05, top_k=K, tail=True),
        lambda b: masked(fused_sd.opsd_loss, b, top_k=K, remainder="tail", tail_floor=1e-7),
    ),
    # SDFT, arXiv 2601.19897
    "SDFT, official code": (official.sdft, sdft),
    "SDFT in TRL": (
        lambda b: official.trl_student_top_k(b, alpha=0.5, top_k=K),
        lambda b: trl(
            fused_sd.sdft_loss, b, alpha=0.5, top_k=K, importance=ImportanceCap(b.old, 2.0)
        ),
    ),
    # GKD, arXiv 2306.13649
    **{
        f"GKD, beta {beta}": (
            lambda b, beta=beta: official.gkd(b, beta=beta, temperature=0.9),
            lambda b, beta=beta: masked(fused_sd.gkd_loss, b, beta=beta, temperature=0.9),
        )
        for beta in (0.0, 0.3, 1.0)
    },
    # teachers behind a server
    "verl, forward_kl_topk": (
        lambda b: official.verl_forward_kl(b, top_k=K, loss_max=10.0),
        lambda b: served(b, remainder="drop", token_clip=(0.0, 10.0)),
    ),
    "verl, forward_kl_topk that is cut": (
        lambda b: official.verl_forward_kl(b, top_k=K, loss_max=0.3),
        lambda b: served(b, remainder="drop", token_clip=(0.0, 0.3)),
    ),
    "Fireworks, topk_forward_kl": (
        lambda b: official.fireworks_forward_kl(b, top_k=K),
        lambda b: served(b, remainder="teacher_renormalize"),
    ),
    # IW-OPD, arXiv 2606.22600, in TRL
    "IW-OPD, mixed divergence over the union": (
        lambda b: official.iw_opd_union(b, beta=0.5, top_k=3),
        lambda b: masked(
            fused_sd.divergence_loss,
            b,
            divergence=Jsd(0.5),
            support=UnionTopK(3),
            reduction="mean",
        ),
    ),
}


@pytest.mark.parametrize("kind", BATCHES)
@pytest.mark.parametrize("method", METHODS)
def test_a_fused_divergence_is_the_official_codes(method, kind):
    exact, fused = METHODS[method]
    batch = BATCHES[kind]()
    assert_same(fused(batch).loss, exact(batch), batch, batch)


@pytest.mark.parametrize("method", METHODS)
def test_what_the_mask_hides_does_not_matter(method):
    exact, fused = METHODS[method]
    plain = BATCHES["masked, two sequences without a teacher"]()
    batch = plain.poisoned()
    assert_same(fused(batch).loss, exact(plain), batch, plain)
