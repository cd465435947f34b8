"""Losses whose coefficient is local to the token: its log-probability to loss and derivative."""

from typing import NamedTuple

import torch
from torch import Tensor

from fused_sd.settings import setting
from fused_sd.terms.evidence import evidence_weight
from fused_sd.terms.weighting import MAX_LOG_RATIO, capped_ratio, log_ratio


@setting
class Surrogate(NamedTuple):
    """Settings of the clipped policy surrogate."""

    ratio_clip: tuple[float, float] | None
    dual_clip: float | None
    evidence_clip: tuple[float, float] | None
    evidence_from_old: bool
    kl_coefficient: float
    kl_estimator: str
    importance_cap: float | None


class TokenTerm(NamedTuple):
    """A token's loss, its derivative by the log-probability, and what to log, each (C,)."""

    loss: Tensor
    dlog_prob: Tensor
    metrics: dict[str, Tensor]


def cross_entropy(log_prob: Tensor) -> TokenTerm:
    """``-log_prob``."""
    return TokenTerm(-log_prob, torch.full_like(log_prob, -1.0), {})


def surrogate(settings: Surrogate, log_prob: Tensor, inputs: dict[str, Tensor]) -> TokenTerm:
    """GRPO's and PPO's clipped surrogate, with RLSD's evidence and a KL to a reference.

    ``-min(rho A', clip(rho, 1 - low, 1 + high) A')`` with ``rho = pi / pi_old``, at least
    ``dual_clip A'`` below 0 where A' < 0, and ``A' = A ((1 - mix) + mix w)``.
    """
    metrics: dict[str, Tensor] = {}
    advantages = inputs["advantages"].to(log_prob)
    old = inputs["old_log_probs"].to(log_prob) if "old_log_probs" in inputs else log_prob
    if settings.evidence_clip is not None:
        reference = old if settings.evidence_from_old else log_prob
        teacher = inputs["teacher_log_probs"].to(log_prob)
        weight, clipped = evidence_weight(teacher, reference, advantages, settings.evidence_clip)
        mix = inputs["mix"].to(log_prob)
        advantages = advantages * ((1 - mix) + mix * weight)
        metrics |= {"evidence_weight": weight, "evidence_clip_fraction": clipped}
        metrics["evidence"] = teacher - reference
    ratio = log_ratio(log_prob, old).exp()
    loss = -ratio * advantages
    follows = (log_prob - old).abs() <= MAX_LOG_RATIO  # the clamp is flat beyond
    if settings.ratio_clip is not None:
        low, high = settings.ratio_clip
        bounded = -ratio.clamp(1 - low, 1 + high) * advantages
        follows = follows & (loss >= bounded)
        loss = torch.maximum(loss, bounded)
    if settings.dual_clip is not None:
        ceiling = -settings.dual_clip * advantages
        cut = (advantages < 0) & (loss > ceiling)
        follows = follows & ~cut
        loss = torch.where(cut, ceiling, loss)
    dlog_prob = torch.where(follows, -ratio * advantages, 0)
    metrics |= {"ratio": ratio, "ratio_clip_fraction": (~follows).to(log_prob)}
    if settings.kl_coefficient:
        known = "reference_log_probs" if "reference_log_probs" in inputs else "teacher_log_probs"
        reference = inputs[known].to(log_prob)
        kl, dkl = sampled_kl(log_prob, reference, settings.kl_estimator)
        loss = loss + settings.kl_coefficient * kl
        dlog_prob = dlog_prob + settings.kl_coefficient * dkl
        metrics["reference_kl"] = sampled_kl(log_prob, reference, "k3")[0]
    if settings.importance_cap is not None:
        weight, _ = capped_ratio(log_prob, old, settings.importance_cap)
        loss, dlog_prob = loss * weight, dlog_prob * weight
    return TokenTerm(loss, dlog_prob, metrics)


def sampled_kl(log_prob: Tensor, reference: Tensor, estimator: str) -> tuple[Tensor, Tensor]:
    """Single-sample estimators of a KL to a reference, of ``d = log_prob - reference``.

    ``"k1"`` is ``sg(d) log_prob`` and ``"k2"`` is ``d^2 / 2``: their gradients, ``d`` times that of
    log_prob, are in expectation the gradient of KL(s||reference).  ``"k3"`` is ``exp(-d) + d - 1``,
    whose gradient is in expectation that of KL(reference||s).
    """
    gap = log_prob - reference
    if estimator == "k1":
        return gap * log_prob, gap
    if estimator == "k2":
        return gap.square() / 2, gap
    back = gap.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).neg()
    return torch.expm1(back) - back, torch.where(gap.abs() <= MAX_LOG_RATIO, -torch.expm1(back), 0)
