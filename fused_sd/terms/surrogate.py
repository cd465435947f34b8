"""Losses of the sampled token: from its log-probability to a loss and the derivative.

The coefficient of such a loss belongs to one token, so that loss and gradient come out of one pass
over the chunk's logits.

Dimension key:  C tokens
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from fused_sd import checks
from fused_sd.settings import setting
from fused_sd.terms.evidence import evidence_weight
from fused_sd.terms.weighting import MAX_LOG_RATIO, capped_ratio, log_ratio

KlEstimator = Literal["k1", "k2", "k3"]


@setting
@dataclass(frozen=True, kw_only=True)
class Surrogate:
    """Settings of the clipped policy surrogate; see ``surrogate`` for the formula.

    Args:
        ratio_clip: (low, high), how far the policy ratio may leave 1; None: no clip.
        dual_clip: bound c > 1 on the loss of tokens with a negative advantage; None: no bound.
        evidence_clip: (low, high) of RLSD's evidence weight; None: no evidence.
        evidence_from_old: whether the evidence compares the teacher with the old policy.
        kl_coefficient: weight of a KL to a reference; 0: none.
        kl_estimator: how that KL is estimated from the sampled token.
        importance_cap: largest importance ratio that multiplies loss and gradient; None: no ratio.

    Raises:
        ValueError: when a number is out of range.
    """

    ratio_clip: tuple[float, float] | None = None
    dual_clip: float | None = None
    evidence_clip: tuple[float, float] | None = None
    evidence_from_old: bool = False
    kl_coefficient: float = 0.0
    kl_estimator: KlEstimator = "k3"
    importance_cap: float | None = None

    def __post_init__(self) -> None:
        if self.ratio_clip is not None:
            checks.check_clip_pair("ratio_clip", self.ratio_clip)
        if self.dual_clip is not None:
            remedy = "verl and RLSD use 3.0; None is no clip"
            checks.check_finite("dual_clip", self.dual_clip, remedy)
            checks.check_number(
                "dual_clip", self.dual_clip, "be above 1", self.dual_clip > 1, remedy
            )
        checks.check_non_negative("kl_coefficient", self.kl_coefficient, "pass 0 for no KL")
        check_estimator("kl_estimator", self.kl_estimator)


def check_estimator(argument: str, estimator: object) -> None:
    """Check the name of an estimator of a KL."""
    if isinstance(estimator, str) and estimator in ("kl", "k1_direct", "direct"):
        checks.fail(
            argument,
            "not differentiate log_prob - reference directly: its gradient does not depend on the "
            "reference",
            repr(estimator),
            "pass 'k1' (sg(d) log_prob), 'k2' or 'k3'",
        )
    checks.check_one_of(argument, estimator, get_args(KlEstimator))


class TokenTerm(NamedTuple):
    """A token's loss, the derivative w.r.t. its log-probability, and what to log, each (C,)."""

    loss: Tensor
    dlog_prob: Tensor
    metrics: dict[str, Tensor]


def cross_entropy(log_prob: Tensor) -> TokenTerm:
    """``-log_prob``."""
    return TokenTerm(-log_prob, torch.full_like(log_prob, -1.0), {})


def surrogate(settings: Surrogate, log_prob: Tensor, inputs: dict[str, Tensor]) -> TokenTerm:
    """GRPO's and PPO's clipped surrogate, with RLSD's evidence and a KL to a reference.

    ``-min(rho A', clip(rho, 1 - low, 1 + high) A')`` with ``rho = pi / pi_old`` and
    ``A' = A ((1 - mix) + mix w)``.  A dual clip c keeps the loss at most ``-c A'`` where A' < 0.

    Args:
        settings: clips and coefficients.
        log_prob: (C,) of the sampled tokens, by the current policy.
        inputs: (C,) each: ``advantages``, and where given ``old_log_probs``,
            ``teacher_log_probs``, ``mix`` and ``reference_log_probs``.
    """
    metrics: dict[str, Tensor] = {}
    advantages = inputs["advantages"].to(log_prob)
    old = inputs["old_log_probs"].to(log_prob) if "old_log_probs" in inputs else log_prob
    if settings.evidence_clip is not None:
        student = old if settings.evidence_from_old else log_prob
        teacher = inputs["teacher_log_probs"].to(log_prob)
        weight, clipped = evidence_weight(teacher, student, advantages, settings.evidence_clip)
        mix = inputs["mix"].to(log_prob)
        advantages = advantages * ((1 - mix) + mix * weight)
        metrics |= {"evidence_weight": weight, "evidence_clip_fraction": clipped}
        metrics["evidence"] = teacher - student
    ratio = log_ratio(log_prob, old).exp()
    loss = -ratio * advantages
    follows = (log_prob - old).abs() <= MAX_LOG_RATIO  # beyond, the clamped ratio is constant
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
    metrics |= {"importance_ratio": ratio, "ratio_clip_fraction": (~follows).to(log_prob)}
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
    """Estimate a KL to a reference from one sample, of ``d = log_prob - reference``.

    ``"k1"`` is ``sg(d) log_prob`` and ``"k2"`` is ``d^2 / 2``.  The gradient of both is ``d`` times
    the gradient of log_prob, in expectation the gradient of KL(s||reference).  ``"k3"`` is
    ``exp(-d) + d - 1``, whose gradient is in expectation that of KL(reference||s); below d = -20
    it stays constant.

    Returns:
        The estimate (C,) and its derivative w.r.t. log_prob (C,).
    """
    gap = log_prob - reference
    if estimator == "k1":
        return gap * log_prob, gap
    if estimator == "k2":
        return gap.square() / 2, gap
    # exp() overflows on one side alone: on the other the penalty must grow and keep its gradient
    back = gap.neg().clamp(max=MAX_LOG_RATIO)
    follows = gap >= -MAX_LOG_RATIO
    return torch.expm1(back) - back, torch.where(follows, -torch.expm1(back), 0)
