"""One number for each token: masks, averages, importance ratios and clips.

Every mode in which a trainer averages token losses is linear in the losses.  Each mode is therefore
a vector of weights for ``token_weights``, together with ``reduction="sum"``.

Dimension key:  B sequences, T tokens of a sequence
"""

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from fused_sd import checks
from fused_sd.checks import tensors as tensor_checks

MAX_LOG_RATIO = 20.0  # log-ratios are clamped to +-20 before exp(), so that none overflows


@dataclass(frozen=True, eq=False)
class ImportanceCap:
    """The truncated importance ratio ``min(pi / pi_old, cap)`` of the sampled token, a constant.

    The loss forms the ratio from the student's own log-probability, at the loss's temperature.

    Args:
        old_log_probs: (...) log-probabilities of the loss's ``token_ids`` when they were sampled,
            nats.
        cap: largest ratio.

    Reference:
        Huebotter et al., *Reinforcement Learning via Self-Distillation* (SDPO), arXiv 2601.20802;
        the cap of 2 is that of the official code's configuration.

    Examples:
        >>> import torch, fused_sd
        >>> (student, teacher), head = torch.randn(2, 2, 16), torch.randn(100, 16)
        >>> given = {"token_ids": torch.tensor([3, 5]), "metrics": ("importance_ratio",)}
        >>> own = fused_sd.token_log_probs(student, head, given["token_ids"]).log_probs
        >>> importance = fused_sd.ImportanceCap(own - torch.tensor([0.0, 9.0]), cap=2.0)
        >>> output = fused_sd.gkd_loss(student, head, teacher, head, importance=importance, **given)
        >>> output.metrics["importance_ratio"]  # the second token has become e^9 times as likely
        tensor([1., 2.])
    """

    old_log_probs: Tensor
    cap: float = 2.0

    def __post_init__(self) -> None:
        old, floats = self.old_log_probs, tensor_checks.FLOATING
        tensor_checks.check_tensor("old_log_probs", old)
        tensor_checks.check_dtype("old_log_probs", old, floats, "pass natural logarithms")
        checks.check_positive("cap", self.cap, "pass importance=None for no importance ratio")


def log_ratio(log_prob: Tensor, old_log_prob: Tensor) -> Tensor:
    """Clamped ``log_prob - old_log_prob``."""
    return (log_prob - old_log_prob).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)


def capped_ratio(log_prob: Tensor, old_log_prob: Tensor, cap: float) -> tuple[Tensor, Tensor]:
    """The importance ratio cut at ``cap``, and 1 where it was cut."""
    ratio = log_ratio(log_prob, old_log_prob.to(log_prob)).exp()
    return ratio.clamp(max=cap), (ratio > cap).to(ratio)


def clip_tokens(loss: Tensor, bounds: tuple[float | None, float | None]) -> tuple[Tensor, Tensor]:
    """A token's loss clipped to (lower, upper), and 1 where it still follows the logits."""
    clipped = loss.clamp(*bounds)
    return clipped, (clipped == loss).to(loss)


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

    Examples:
        >>> import torch, fused_sd
        >>> mask = torch.tensor([[1, 1, 1, 1], [1, 0, 0, 0]])  # responses of 4 tokens and of 1
        >>> fused_sd.aggregation_weights(mask, "token_mean")
        tensor([[0.2000, 0.2000, 0.2000, 0.2000],
                [0.2000, 0.0000, 0.0000, 0.0000]])
        >>> fused_sd.aggregation_weights(mask, "sequence_mean_token_mean")
        tensor([[0.1250, 0.1250, 0.1250, 0.1250],
                [0.5000, 0.0000, 0.0000, 0.0000]])
    """
    checks.check_one_of("mode", mode, get_args(Aggregation))
    _check_sequences(mask)
    if not isinstance(dtype, torch.dtype) or dtype not in tensor_checks.FLOATING:
        checks.fail("dtype", "be a torch.dtype of floats", repr(dtype), "pass torch.float32")
    _check_divisor("num_tokens", num_tokens, mode == "token_mean", "token_mean")
    _check_divisor("length", length, mode == "constant_length", "constant_length")
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
    if length is None:
        remedy = "pass the completion length to divide by"
        checks.fail("length", 'come with "constant_length"', "None", remedy)
    return weights / (length * max(mask.shape[0], 1))


def _check_sequences(mask: object) -> None:
    """Check a mask of sequences."""
    tensor_checks.check_mask("mask", mask)
    assert isinstance(mask, Tensor)
    if mask.dim() != 2:
        checks.fail("mask", "be (B, T)", tuple(mask.shape), "give one row for each sequence")


def _check_divisor(argument: str, divisor: object, is_read: bool, mode: str) -> None:
    """Check a divisor of a sum, and that the mode reads it."""
    if divisor is None:
        return
    if not is_read:
        remedy = "leave it out, or name that mode"
        checks.fail(argument, f'come with "{mode}"', repr(divisor), remedy)
    if not isinstance(divisor, Tensor):
        checks.check_positive(argument, divisor, "pass the number of tokens to divide by")
        return
    tensor_checks.check_tensor(argument, divisor)
    tensor_checks.check_dtype(argument, divisor, tensor_checks.REAL, "pass one number")
    if divisor.numel() != 1:
        checks.fail(argument, "be one number", tuple(divisor.shape), "sum the mask")


def skip_first_tokens(mask: Tensor, num_tokens: int) -> Tensor:
    """The mask (B, T) without each sequence's first counted tokens (SDFT's code skips 3).

    Examples:
        >>> import torch, fused_sd
        >>> mask = torch.tensor([[0, 1, 1, 1, 1], [1, 1, 0, 0, 1]])  # one with a tool's answer
        >>> fused_sd.skip_first_tokens(mask, 2)
        tensor([[0, 0, 0, 1, 1],
                [0, 0, 0, 0, 1]])
    """
    _check_sequences(mask)
    checks.check_whole("num_tokens", num_tokens, "pass a whole number; 0 skips none")
    counted = mask != 0
    return torch.where(counted & (counted.cumsum(-1) > num_tokens), mask, 0)
