"""Methods that no single call computes: what they are made of, against their official codes.

``COMPOSITIONS`` is the catalogue.  ``token_log_probs`` and ``entry_log_probs`` are differentiable,
so anything made of few log-probabilities of a token is plain PyTorch on (B, T) or (B, T, K).
"""

import official
import official_policies
import pytest
import torch
from official_batches import BATCHES, FLOAT, Batch, assert_same
from torch import Tensor

import fused_sd
from fused_sd import Evidence

K = 6
TOKENS = 37.0


def mean(batch: Batch, part: Tensor | None = None, num_tokens: float | None = None) -> Tensor:
    """Weights of the micro-batch's token mean, and of a part of its tokens."""
    weights = fused_sd.aggregation_weights(
        batch.mask, "token_mean", num_tokens=num_tokens, dtype=FLOAT
    )
    return weights if part is None else torch.where(part, weights, 0)


def total(token_loss: Tensor, weights: Tensor) -> Tensor:
    return torch.where(weights != 0, token_loss, 0).mul(weights).sum()


def log_prob(batch: Batch, **settings: object) -> fused_sd.TokenLogProbs:
    """(B, T), differentiable, 0 where the mask is."""
    return fused_sd.token_log_probs(*batch.sampled, token_weights=batch.mask, **settings)


@torch.no_grad()
def teacher_log_prob(batch: Batch, **settings: object) -> fused_sd.TokenLogProbs:
    return fused_sd.token_log_probs(
        *batch.teacher, batch.token_ids, token_weights=batch.mask, **settings
    )


def sd_zero_with_zeros_outside(batch: Batch, forward_weight: float) -> Tensor:
    """The student's whole softmax against a teacher of exp(-100) outside its top-k."""
    ids, teacher = fused_sd.entry_log_probs(*batch.teacher, K, token_weights=batch.mask)[:2]
    teacher = teacher.detach().log_softmax(-1)
    student = fused_sd.entry_log_probs(
        batch.hidden, batch.head, ids, token_weights=batch.mask
    ).log_probs
    forward = (teacher.exp() * (teacher - student)).sum(-1)
    inside = student.exp()
    reverse = -log_prob(batch, entropy=True).entropy - (inside * teacher).sum(-1)
    reverse = reverse + 100 * (1 - inside.sum(-1))
    mixed = forward_weight * forward + (1 - forward_weight) * reverse
    return total(mixed, mean(batch, num_tokens=TOKENS))


def rlsd_in_places(batch: Batch, places: Tensor) -> Tensor:
    """RLSD where ``places`` says so and GRPO elsewhere: no token is run twice."""
    settings = {
        "old_log_probs": batch.old,
        "ratio_clip": (0.2, 0.28),
        "dual_clip": 3.0,
        "reduction": "sum",
    }
    reweighted = fused_sd.rlsd_loss(
        *batch.policy,
        teacher_hidden=batch.teacher_hidden,
        teacher_head=batch.teacher_head,
        evidence=Evidence(),
        token_weights=mean(batch, places),
        **settings,
    )
    plain = fused_sd.grpo_loss(*batch.policy, token_weights=mean(batch, ~places), **settings)
    return reweighted.loss + plain.loss


def negative(batch: Batch) -> Tensor:
    counted = torch.where(batch.mask != 0, batch.advantages, 0)
    return (counted.sum(-1, keepdim=True) < 0).expand_as(batch.mask)


def thought(batch: Batch) -> Tensor:
    """The span between two tags, say."""
    return (torch.arange(batch.mask.shape[1]) % 3 == 0).expand_as(batch.mask)


def low_variance_kl(batch: Batch) -> Tensor:
    back = (batch.reference - log_prob(batch).log_probs).clamp(-20, 20)
    return total((back.exp() - back - 1).clamp(-10, 10), mean(batch))


def verl_with_bounded_log_probs(batch: Batch, least: float) -> Tensor:
    """Both sides' log-probabilities are bounded before the divergence."""
    teacher, ids = official.served(batch, K)
    student = fused_sd.entry_log_probs(batch.hidden, batch.head, ids, token_weights=batch.mask)
    student, teacher = student.log_probs.clamp(min=least), teacher.clamp(min=least)
    token_loss = (teacher.exp() * (teacher - student)).sum(-1).clamp(min=0)
    return total(token_loss, mean(batch))


def sdpg(
    batch: Batch, kl_mode: str, beta: float, alpha: float, positive_only: bool = False
) -> Tensor:
    """Dual-clip PPO, a full-vocabulary KL to a teacher at temperature 1, a term to the old policy.

    The term is k2 (urkl), k3 and a constant (ufkl), k2 to a shifted reference (rkl), or k3 and
    cross entropy (fkl); the constants have no gradient, and make the logged value the code's.
    """
    run = {"token_weights": mean(batch), "reduction": "sum", "temperature": 0.8}
    loss = fused_sd.policy_loss(
        *batch.policy, old_log_probs=batch.rollout, dual_clip=10.0, **run
    ).loss
    part = batch.advantages > 0 if positive_only else None
    distance = fused_sd.divergence_loss(
        *batch.sides,
        divergence="reverse_kl",
        teacher_temperature=1.0,
        token_clip=20.0,
        **{**run, "token_weights": mean(batch, part)},
    ).loss
    reference = batch.old - 1 if kl_mode == "rkl" else batch.old
    estimator = "k2" if kl_mode in ("urkl", "rkl") else "k3"
    term = fused_sd.sampled_kl_loss(
        *batch.sampled, teacher_log_probs=reference, estimator=estimator, **run
    ).loss
    if kl_mode == "ufkl":
        term = term + mean(batch).sum()
    if kl_mode == "fkl":
        term = term + fused_sd.cross_entropy_loss(*batch.sampled, **run).loss
        term = term + total(batch.old + 1, mean(batch))
    return loss + beta * distance + alpha * term


def srpo(batch: Batch) -> Tensor:
    """Successes by GRPO, failures by SDPO with weights that the teacher's entropy sets."""
    advantages = torch.where(batch.mask != 0, batch.advantages, 0)
    success = (advantages.sum(-1, keepdim=True) > 0).expand_as(batch.mask)
    weight = torch.exp(-teacher_log_prob(batch, entropy=True).entropy)
    failed = torch.where(success, 0, batch.mask)
    weight = weight / (total(weight, failed) / failed.sum().clamp(min=1)).clamp(min=1e-8)
    surrogate = fused_sd.grpo_loss(
        *batch.policy,
        old_log_probs=batch.old,
        dual_clip=3.0,
        token_weights=mean(batch, success),
        reduction="sum",
    )
    distilled = fused_sd.sdpo_loss(
        *batch.sides,
        top_k=K,
        tail_floor=1e-7,
        token_weights=mean(batch, ~success) * weight,
        reduction="sum",
    )
    return surrogate.loss + distilled.loss


def grpo_with_correction(batch: Batch, beta: float) -> Tensor:
    """TRL's: the rollout correction is on the surrogate, not on the KL to the reference."""
    ratio = (batch.old - batch.rollout).exp().clamp(max=2)
    weights = torch.where(batch.mask != 0, mean(batch) * ratio, 0)
    surrogate = fused_sd.grpo_loss(
        *batch.policy, old_log_probs=batch.old, token_weights=weights, reduction="sum"
    )
    distance = fused_sd.sampled_kl_loss(
        *batch.sampled,
        teacher_log_probs=batch.reference,
        estimator="k3",
        token_weights=mean(batch),
        reduction="sum",
    )
    return surrogate.loss + beta * distance.loss


def sdar(batch: Batch) -> Tensor:
    gap = teacher_log_prob(batch).log_probs - log_prob(batch).log_probs
    return total(torch.sigmoid(5 * gap.detach()) * gap, mean(batch))


COMPOSITIONS = {
    "SD-Zero, zeros outside the top-k": (
        lambda b: official.sd_zero(b, top_k=K, num_tokens=TOKENS, zero_outside=True),
        lambda b: sd_zero_with_zeros_outside(b, 0.5),
    ),
    "SD-Zero, zeros outside the top-k, reverse": (
        lambda b: official.sd_zero(
            b, top_k=K, num_tokens=TOKENS, zero_outside=True, forward_weight=0.0
        ),
        lambda b: sd_zero_with_zeros_outside(b, 0.0),
    ),
    "RLSD, negative advantages only": (
        lambda b: official_policies.rlsd(b, negative_only=True),
        lambda b: rlsd_in_places(b, negative(b)),
    ),
    "RLSD, thoughts only": (
        lambda b: official_policies.rlsd(b, thought=thought(b)),
        lambda b: rlsd_in_places(b, thought(b)),
    ),
    "GRPO in TRL with a rollout correction and beta": (
        lambda b: official_policies.grpo_trl(b, loss_type="bnpo", beta=0.1, correct=True),
        lambda b: grpo_with_correction(b, 0.1),
    ),
    "k3 in verl": (official_policies.low_variance_kl, low_variance_kl),
    "verl, forward_kl_topk with bounded log-probabilities": (
        lambda b: official.verl_forward_kl(b, top_k=K, log_prob_min=-3.0),
        lambda b: verl_with_bounded_log_probs(b, -3.0),
    ),
    **{
        f"SDPG (arXiv 2606.04036), {kl_mode}": (
            lambda b, mode=kl_mode: official_policies.sdpg(b, mode, beta=0.3, alpha=0.2),
            lambda b, mode=kl_mode: sdpg(b, mode, beta=0.3, alpha=0.2),
        )
        for kl_mode in ("fkl", "rkl", "ufkl", "urkl")
    },
    "SDPG, distilled where the advantage is positive": (
        lambda b: official_policies.sdpg(b, "urkl", beta=0.3, alpha=0.2, positive_only=True),
        lambda b: sdpg(b, "urkl", beta=0.3, alpha=0.2, positive_only=True),
    ),
    "SRPO (arXiv 2604.02288)": (lambda b: official_policies.srpo(b, top_k=K), srpo),
    "SDAR": (official_policies.sdar, sdar),
}


@pytest.mark.parametrize("kind", BATCHES)
@pytest.mark.parametrize("method", COMPOSITIONS)
def test_a_composition_is_the_official_code(method, kind):
    exact, composed = COMPOSITIONS[method]
    batch = BATCHES[kind]()
    assert_same(composed(batch), exact(batch), batch, batch)


@pytest.mark.parametrize("method", COMPOSITIONS)
def test_what_the_mask_hides_does_not_matter(method):
    exact, composed = COMPOSITIONS[method]
    plain = BATCHES["ragged"]()
    batch = plain.poisoned()
    assert_same(composed(batch), exact(plain), batch, plain)
