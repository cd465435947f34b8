"""What official codes compute from the sampled token, in plain PyTorch on whole logits.

As ``official.py``: other words than the codes', nothing of the library, one function for each
method, from a ``Batch`` to the loss that is differentiated.

Dimension key:  B sequences, T tokens of a sequence, V vocabulary, K wrong hints
"""

import math
from typing import NamedTuple

import torch
from official import clamped_tail, generalized_jsd, kl, token_mean
from official_batches import Batch
from torch import Tensor


def dual_clipped(
    log_prob: Tensor,
    old: Tensor,
    advantages: Tensor,
    clip: tuple[float, float] = (0.2, 0.2),
    dual: float | None = 3.0,
) -> Tensor:
    """verl's surrogate: log-ratio within +-20, clip, and a second clip for negative advantages."""
    ratio = (log_prob - old).clamp(-20, 20).exp()
    low, high = clip
    higher = torch.maximum(-advantages * ratio, -advantages * ratio.clamp(1 - low, 1 + high))
    if dual is None:
        return higher
    return torch.where(advantages < 0, torch.minimum(higher, -advantages * dual), higher)


def clipped_in_log_space(
    log_prob: Tensor, old: Tensor, advantages: Tensor, clip: tuple[float, float], dual: float
) -> Tensor:
    """EasyR1's surrogate, under RLSD: the clip bounds the log-ratio."""
    log_ratio = (log_prob - old).clamp(-20, 20)
    bounded = log_ratio.clamp(math.log(1 - clip[0]), math.log(1 + clip[1])).exp()
    higher = torch.max(-advantages * log_ratio.exp(), -advantages * bounded)
    return torch.where(advantages < 0, torch.min(higher, -advantages * dual), higher)


def own(batch: Batch) -> Tensor:
    """(B, T) log-probabilities of the policy, differentiable."""
    return batch.log_prob(batch.student_logits())


def grpo_verl(batch: Batch, *, clip: tuple[float, float], dual: float) -> Tensor:
    return token_mean(dual_clipped(own(batch), batch.old, batch.advantages, clip, dual), batch.mask)


def grpo_trl(
    batch: Batch,
    *,
    clip: tuple[float, float] = (0.2, 0.2),
    delta: float | None = None,
    beta: float = 0.0,
    loss_type: str = "dapo",
    num_tokens: float = 1.0,
    length: int = 1,
    correct: bool = False,
) -> Tensor:
    """TRL's GRPO: nothing bounds the log-ratio; ``delta`` cuts the unclipped ratio.

    ``correct`` multiplies the surrogate by the truncated ratio to the sampling engine.
    """
    log_prob, mask = own(batch), batch.mask
    ratio = (log_prob - batch.old).exp()
    bounded = ratio.clamp(1 - clip[0], 1 + clip[1])
    if delta is not None:
        ratio = ratio.clamp(max=delta)
    token_loss = -torch.min(ratio * batch.advantages, bounded * batch.advantages)
    if correct:
        token_loss = token_loss * (batch.old - batch.rollout).exp().clamp(max=2)
    back = batch.reference - log_prob
    token_loss = token_loss + beta * (back.exp() - back - 1)
    if loss_type == "grpo":
        return ((token_loss * mask).sum(-1) / mask.sum(-1).clamp(min=1)).mean()
    divisor = {
        "bnpo": mask.sum().clamp(min=1),
        "dapo": num_tokens,
        "dr_grpo": len(mask) * length,
    }
    return (token_loss * mask).sum() / divisor[loss_type]


def low_variance_kl(batch: Batch) -> Tensor:
    """verl's k3 to a reference: the exponent within +-20, the value within +-10."""
    back = (batch.reference - own(batch)).clamp(-20, 20)
    return token_mean((back.exp() - back - 1).clamp(-10, 10), batch.mask)


def rlsd(
    batch: Batch,
    *,
    mix: float = 0.5,
    evidence_clip: float = 0.2,
    ratio_clip: tuple[float, float] = (0.2, 0.28),
    dual: float = 3.0,
    from_old: bool = False,
    negative_only: bool = False,
    thought: Tensor | None = None,
) -> Tensor:
    """RLSD's code: advantages times a clipped weight, inside the surrogate clipped in log space.

    ``from_old`` takes the student's log-probability as sampled (ms-swift, SDPG);
    ``negative_only`` and ``thought`` leave the advantage as it is elsewhere.
    """
    log_prob = own(batch)
    student = batch.old if from_old else log_prob.detach()
    gap = torch.where(batch.mask != 0, batch.log_prob(batch.teacher_logits()) - student, 0)
    weight = torch.exp(torch.sign(batch.advantages) * gap) * batch.mask
    scale = (1 - mix) + mix * weight.clamp(1 - evidence_clip, 1 + evidence_clip)
    if negative_only:
        scale = torch.where(batch.advantages.sum(-1, keepdim=True) < 0, scale, 1)
    if thought is not None:
        scale = torch.where(thought != 0, scale, 1)
    shaped = batch.advantages * scale
    return token_mean(
        clipped_in_log_space(log_prob, batch.old, shaped, ratio_clip, dual), batch.mask
    )


def rlsd_mix(step: int, mix: float, warmup: int, decay: int) -> float:
    """RLSD's lambda at an update, of which the first is number 1."""
    if warmup > 0 and step < warmup:
        return mix * step / warmup
    if decay > 0 and step >= warmup:
        return mix * max(1 - (step - warmup) / decay, 0)
    return mix


def rlcsd_mix(step: int, mix: float, decay: int) -> float:
    """RLCSD's own RLSD: the first update, number 1, has the whole lambda."""
    return max(0, mix * (1 - (step - 1) / decay))


class Contrast(NamedTuple):
    """RLCSD's settings: those of its YAML, and those its code falls back to."""

    tau: float
    beta: float
    lam: float
    delta: float
    bounds: tuple[float, float]
    eta: float = 1.0


RLCSD_YAML = Contrast(0.02, 1.0, 0.5, 0.02, (-2.0, 2.0))
RLCSD_CODE = Contrast(0.03, 0.2, 0.5, 0.02, (-0.5, 0.5))


def rlcsd(batch: Batch, settings: Contrast, correction: Tensor | None = None) -> Tensor:
    """RLCSD: unselected and selected tokens each have their own mean."""
    log_prob, mask = own(batch), batch.mask
    valid = batch.wrong_mask[:, None, :].expand_as(batch.wrong)
    pooled = batch.wrong.masked_fill(~valid, -torch.inf).logsumexp(-1)
    pooled = pooled - valid.sum(-1).clamp(min=1).to(pooled).log()
    residual = settings.beta * settings.lam * torch.tanh((batch.correct - pooled) / settings.tau)
    residual = residual.clamp(*settings.bounds)
    selected = ((residual.abs() > settings.delta) & (mask != 0)).to(mask)
    moved = batch.advantages + selected * residual
    moved = torch.where(
        batch.advantages > 0,
        moved.clamp(min=0),
        torch.where(batch.advantages < 0, moved.clamp(max=0), 0),
    )
    total = log_prob.new_zeros(())
    for part, advantages, scale in (
        (mask * (1 - selected), batch.advantages, 1.0),
        (mask * selected, moved, settings.eta),
    ):
        token_loss = dual_clipped(log_prob, batch.old, advantages, dual=None)
        if correction is not None:
            token_loss = token_loss * correction
        total = total + scale * (token_loss * part).sum() / part.sum().clamp(min=1)
    return total


def sdpg(
    batch: Batch,
    kl_mode: str,
    *,
    beta: float = 0.3,
    alpha: float = 0.2,
    temperature: float = 0.8,
    clip: tuple[float, float] = (0.2, 0.2),
    positive_only: bool = False,
) -> Tensor:
    """SDPG: surrogate against the rollout, KL(s||t) below 20 to a teacher at temperature 1, and a
    term to the old policy."""
    logits = batch.student_logits(temperature)
    log_prob = batch.log_prob(logits)
    surrogate = dual_clipped(log_prob, batch.rollout, batch.advantages, clip, dual=10.0)
    distance = kl(logits.log_softmax(-1), batch.teacher_logits().log_softmax(-1)).sum(-1)
    distance = distance.clamp(max=20)
    if positive_only:
        distance = distance * (batch.advantages > 0)
    gap = log_prob - batch.old
    terms = {
        "fkl": torch.exp(-gap),
        "rkl": (gap + 1).square() / 2,
        "ufkl": torch.exp(-gap) + gap,
        "urkl": gap.square() / 2,
    }
    return token_mean(surrogate + beta * distance + alpha * terms[kl_mode], batch.mask)


def iw_opd(batch: Batch, gamma: float = 0.5) -> Tensor:
    """IW-OPD in TRL: the teacher's advantage over the rollout, weighted towards early errors."""
    mask = batch.mask
    gap = (batch.log_prob(batch.teacher_logits()) - batch.rollout) * mask
    before = torch.cat([torch.zeros_like(gap[:, :1]), gap.abs().cumsum(-1)[:, :-1]], -1)
    weight = 1 + gamma * (1 - before / gap.abs().sum(-1, keepdim=True).clamp(min=1e-8))
    return token_mean(-weight * gap * own(batch), mask)


def srpo(batch: Batch, *, top_k: int, beta: float = 1.0) -> Tensor:
    """SRPO as RLCSD runs it: successes by GRPO, failures by SDPO times a weight of the entropy."""
    mask, logits = batch.mask, batch.student_logits()
    per_row = batch.mask.sum(-1).clamp(min=1)
    success = ((batch.advantages * mask).sum(-1) / per_row > 0)[:, None]
    failed = mask * ~success
    teacher = batch.teacher_logits().log_softmax(-1)
    weight = torch.exp(beta * (teacher.exp() * teacher).sum(-1))
    weight = weight / token_mean(weight, failed).clamp(min=1e-8)
    student = logits.log_softmax(-1)
    ids = student.topk(top_k, -1).indices
    sides = clamped_tail(student.gather(-1, ids)), clamped_tail(teacher.gather(-1, ids))
    distilled = generalized_jsd(*sides, 0.5).sum(-1) * weight
    surrogate = dual_clipped(batch.log_prob(logits), batch.old, batch.advantages)
    return token_mean(torch.where(success, surrogate, distilled), mask)


def sdar(batch: Batch) -> Tensor:
    """SDAR's distillation term in ms-swift: a sigmoid of the gap gates the gap."""
    log_prob = own(batch)
    teacher = batch.log_prob(batch.teacher_logits())
    gate = torch.sigmoid(5 * (teacher - log_prob.detach()))
    return token_mean(gate * (teacher - log_prob), batch.mask)
