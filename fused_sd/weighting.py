"""One number for each token: masks and means, importance ratios, and advantages that teachers
shape.

Every mode in which a trainer averages token losses is linear in them, so it is a vector of weights
for ``token_weights`` together with ``reduction="sum"``.

Dimension key:  B sequences, T tokens of a sequence
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fused_sd import checks

MAX_LOG_RATIO = 20.0  # log-ratios are clamped to +-20 before exp(), so that none overflows


@dataclass(frozen=True, eq=False)
class ImportanceCap:
    """The truncated importance ratio ``min(pi / pi_old, cap)`` of the sampled token, a constant.

    It is formed inside the loss from the student's own log-probability, at the loss's temperature.

    Args:
        old_log_probs: (...) log-probabilities of the loss's ``token_ids`` when they were sampled,
            nats.
        cap: largest ratio.

    Reference:
        Huebotter et al., *Reinforcement Learning via Self-Distillation* (SDPO), arXiv 2601.20802;
        the cap of 2 is that of the official code's configuration.
    """

    old_log_probs: Tensor
    cap: float = 2.0

    def __post_init__(self) -> None:
        checks.check_positive("cap", self.cap, "pass importance=None for no importance ratio")


def log_ratio(log_prob: Tensor, old_log_prob: Tensor) -> Tensor:
    """Clamped ``log_prob - old_log_prob``."""
    return (log_prob - old_log_prob).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)


def capped_ratio(log_prob: Tensor, old_log_prob: Tensor, cap: float) -> tuple[Tensor, Tensor]:
    """The importance ratio cut at ``cap``, and 1 where it was cut."""
    ratio = log_ratio(log_prob, old_log_prob.to(log_prob)).exp()
    return ratio.clamp(max=cap), (ratio > cap).to(ratio)


Aggregation = Literal[
    "token_sum",
    "token_mean",
    "sequence_mean_token_sum",
    "sequence_mean_token_mean",
    "all_sequences_mean_token_mean",
    "constant_length",
]


def aggregation_weights(
    mask: Tensor,  # (B, T)
    mode: Aggregation,
    *,
    num_tokens: Tensor | float | None = None,
    length: float | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Token weights (B, T) whose weighted sum is a trainer's average of the token losses.

    Args:
        mask: (B, T) 1 where a token counts.
        mode: ``"token_sum"``; ``"token_mean"`` over the micro-batch, or over ``num_tokens`` tokens
            of the whole batch (TRL's dapo, verl's and SD-Zero's global mean);
            ``"sequence_mean_token_sum"`` and ``"sequence_mean_token_mean"`` over sequences that
            have tokens (verl); ``"all_sequences_mean_token_mean"`` over all, empty ones too (TRL's
            SDPO, SDFT and "grpo"); ``"constant_length"`` divides by ``B * length`` (Dr. GRPO).
        num_tokens: divisor of "token_mean"; None: the mask's own sum.
        length: tokens that a sequence counts as in "constant_length".
        dtype: of the weights; float64 for a loss in float64.

    Returns:
        Weights, 0 where the mask is.

    Raises:
        ValueError: when the mask is not (B, T), or the mode or its length is missing.
    """
    checks.check_tensor("mask", mask)
    if mask.dim() != 2:
        checks.fail("mask", "be (B, T)", tuple(mask.shape), "give one row for each sequence")
    weights = mask.to(dtype)
    per_sequence = weights.sum(-1, keepdim=True)
    num_nonempty = (per_sequence > 0).sum().clamp(min=1)
    if mode == "token_sum":
        return weights
    if mode == "token_mean":
        if num_tokens is None:
            return weights / weights.sum().clamp(min=1)
        return weights / num_tokens
    if mode == "sequence_mean_token_sum":
        return weights / num_nonempty
    if mode == "sequence_mean_token_mean":
        return weights / per_sequence.clamp(min=1) / num_nonempty
    if mode == "all_sequences_mean_token_mean":
        return weights / per_sequence.clamp(min=1) / max(mask.shape[0], 1)
    if mode == "constant_length":
        checks.check_positive("length", length, "pass the completion length to divide by")
        assert length is not None
        return weights / (length * max(mask.shape[0], 1))
    modes = Aggregation.__args__
    checks.check_one_of("mode", mode, modes)
    raise AssertionError(mode)


def skip_first_tokens(mask: Tensor, num_tokens: int) -> Tensor:
    """The mask (B, T) without each sequence's first counted tokens (SDFT's code skips 3)."""
    checks.check_non_negative("num_tokens", num_tokens, "pass 0 to skip none")
    counted = mask != 0
    return torch.where(counted & (counted.cumsum(-1) > num_tokens), mask, 0)


@dataclass(frozen=True)
class Evidence:
    """RLSD's reweighting of an advantage by what the teacher knows.

    ``delta = log P_T - log P_S`` of the sampled token (a constant), ``w = exp(sign(A) delta)``
    clipped to ``[1 - clip[0], 1 + clip[1]]``, and the advantage becomes ``A ((1 - mix) + mix w)``.

    Args:
        clip: how far the weight may leave 1, downwards and upwards.
        mix: lambda, the share of the evidence; a float, or an ``EvidenceSchedule``'s current value.
        log_prob: whether P_S is the ``"current"`` policy (the official code) or the ``"old"`` one
            that sampled the token (ms-swift, SDPG).

    Reference:
        Yang et al., *Self-Distilled RLVR* (RLSD), arXiv 2604.03128, eq. 13-15.  Equation 16 of
        the paper has no policy ratio and so, the weight being a constant, no gradient; the official
        code reweights the advantage of a clipped policy ratio, as here.
    """

    clip: tuple[float, float] = (0.2, 0.2)
    mix: float = 0.5
    log_prob: Literal["current", "old"] = "current"

    def __post_init__(self) -> None:
        checks.check_ratio_clip(self.clip)
        checks.check_unit_interval("mix", self.mix)
        checks.check_one_of("log_prob", self.log_prob, ("current", "old"))


def evidence_weight(
    teacher_log_prob: Tensor,
    student_log_prob: Tensor,
    advantages: Tensor,
    clip: tuple[float, float],
) -> tuple[Tensor, Tensor]:
    """RLSD's clipped weight of each token, and 1 where it was clipped."""
    delta = log_ratio(teacher_log_prob, student_log_prob)
    weight = torch.exp(torch.sign(advantages) * delta)
    clipped = weight.clamp(1 - clip[0], 1 + clip[1])
    return clipped, (clipped != weight).to(weight)


class EvidenceSchedule:
    """RLSD's lambda over the training steps: linear warm-up, hold, linear decay to 0.

    Call ``step()`` after each optimiser step and pass ``value`` as ``Evidence.mix``.

    Args:
        peak: lambda after the warm-up.
        warmup_steps: steps from 0 to the peak.
        hold_steps: steps at the peak.
        decay_steps: steps from the peak to 0; 0 holds it for ever.
    """

    def __init__(
        self, peak: float = 0.5, warmup_steps: int = 0, hold_steps: int = 0, decay_steps: int = 0
    ) -> None:
        checks.check_unit_interval("peak", peak)
        for name, steps in (
            ("warmup_steps", warmup_steps),
            ("hold_steps", hold_steps),
            ("decay_steps", decay_steps),
        ):
            checks.check_non_negative(name, steps, "pass a number of steps")
        self.peak, self.warmup_steps = peak, warmup_steps
        self.hold_steps, self.decay_steps = hold_steps, decay_steps
        self.num_steps = 0

    def step(self) -> None:
        """Note that an optimiser step was taken."""
        self.num_steps += 1

    @property
    def value(self) -> float:
        """Lambda now."""
        if self.num_steps < self.warmup_steps:
            return self.peak * self.num_steps / self.warmup_steps
        late = self.num_steps - self.warmup_steps - self.hold_steps
        if self.decay_steps == 0 or late <= 0:
            return self.peak
        return self.peak * max(0.0, 1 - late / self.decay_steps)

    def state_dict(self) -> dict[str, int]:
        return {"num_steps": self.num_steps}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.num_steps = state["num_steps"]


@dataclass(frozen=True, eq=False)
class ContrastiveAdvantages:
    """What RLCSD makes of an advantage: see ``rlcsd_advantages``."""

    advantages: Tensor  # (...) A, or A + r at the selected tokens
    selected: Tensor  # (...) bool
    evidence: Tensor  # (...) e, nats


def rlcsd_advantages(
    advantages: Tensor,  # (...)
    correct_log_probs: Tensor,  # (...)
    wrong_log_probs: Tensor,  # (..., K)
    *,
    wrong_mask: Tensor | None = None,  # (..., K)
    temperature: float = 0.02,
    scale: float = 1.0,
    mix: float = 0.5,
    threshold: float = 0.02,
    clip: tuple[float, float] = (-2.0, 2.0),
) -> ContrastiveAdvantages:
    """RLCSD's advantages from a teacher that was shown a correct hint and others with wrong ones.

    ``e = b_correct - (logsumexp_k b_wrong_k - log K)``, ``r = clip(scale mix tanh(e /
    temperature))``; where ``|r| > threshold`` the advantage becomes ``A + r`` without changing its
    sign.

    Args:
        advantages: (...) A.
        correct_log_probs: (...) the sampled token's log-probability under the correct hint.
        wrong_log_probs: (..., K) the same under each wrong hint.
        wrong_mask: (..., K) bool, False for hints that are missing; None: all there.
        temperature, scale, mix, threshold, clip: tau_c, beta, lambda, delta and the residual's
            bounds. The defaults are the official configuration's; its code's own defaults are
            (0.03, 0.2, 0.5, 0.02, (-0.5, 0.5)).

    Returns:
        Advantages, the selected tokens and e.  A token without any wrong hint keeps its advantage
        (the official code drops its sample instead: an empty logsumexp would select it).

    Reference:
        *RLCSD*, arXiv 2606.11709.
    """
    checks.check_positive("temperature", temperature)
    if wrong_mask is None:
        wrong_mask = torch.ones_like(wrong_log_probs, dtype=torch.bool)
    num_wrong = wrong_mask.sum(-1)
    pooled = wrong_log_probs.detach().masked_fill(~wrong_mask, -torch.inf).logsumexp(-1)
    evidence = correct_log_probs.detach() - (pooled - num_wrong.clamp(min=1).to(pooled).log())
    evidence = torch.where(num_wrong > 0, evidence, 0)
    residual = (scale * mix * torch.tanh(evidence / temperature)).clamp(*clip)
    selected = residual.abs() > threshold
    shifted = advantages + residual
    kept = torch.where(advantages > 0, shifted.clamp(min=0), shifted.clamp(max=0))
    kept = torch.where(advantages == 0, 0, kept)
    return ContrastiveAdvantages(torch.where(selected, kept, advantages), selected, evidence)


def iw_opd_advantages(
    teacher_log_probs: Tensor,  # (B, T)
    rollout_log_probs: Tensor,  # (B, T)
    mask: Tensor,  # (B, T)
    *,
    gamma: float = 0.5,
) -> Tensor:
    """IW-OPD's advantages (B, T): ``w_t A_t`` with more weight where a sequence begins to err.

    ``A_t = b_t - a_t`` of the sampled token and
    ``w_t = 1 + gamma (1 - sum_{u<t} |A_u| / sum_u |A_u|)``.  Train on ``policy_loss`` with
    them; 0 where the mask is.

    Raises:
        ValueError: when a log-probability that counts is not finite (on the CPU).

    Reference:
        *IW-OPD*, arXiv 2606.22600.
    """
    checks.check_non_negative("gamma", gamma, "0.5 is the paper's")
    counted = mask.to(torch.bool)
    gap = torch.where(counted, teacher_log_probs.detach() - rollout_log_probs.detach(), 0)
    if gap.device.type == "cpu" and not bool(torch.isfinite(gap).all()):
        checks.fail(
            "teacher_log_probs",
            "be finite wherever the mask is set",
            "a value that is not",
            "mask the token, or ask the teacher for that id",
        )
    size = gap.abs()
    before = size.cumsum(-1) - size
    whole = size.sum(-1, keepdim=True).clamp(min=1e-8)
    return (1 + gamma * (1 - before / whole)) * gap
