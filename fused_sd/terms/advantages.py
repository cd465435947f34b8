"""Advantages that a teacher changes, from log-probabilities of the sampled tokens.

Dimension key:  (...) tokens, B sequences, T tokens of a sequence, K hints
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from fused_sd import checks
from fused_sd.checks import tensors as tensor_checks


@dataclass(frozen=True, eq=False)
class ContrastiveAdvantages:
    """RLCSD's advantages: see ``rlcsd_advantages``.

    Attributes:
        advantages: (...) A, or A + r at the selected tokens.
        selected: (...) bool, the tokens whose advantage was changed.
        evidence: (...) e, nats.
    """

    advantages: Tensor
    selected: Tensor
    evidence: Tensor


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
    """RLCSD's advantages: a teacher with a correct hint against teachers with wrong ones.

    ``e = b_correct - (logsumexp_k b_wrong_k - log K)``, ``r = clip(scale mix tanh(e /
    temperature))``; where ``|r| > threshold`` the advantage becomes ``A + r`` without changing its
    sign.

    Args:
        advantages: (...) A.
        correct_log_probs: (...) the sampled token's log-probability under the correct hint.
        wrong_log_probs: (..., K) the same under each wrong hint.
        wrong_mask: (..., K) bool, False for hints that are missing; None: none is missing.
        temperature, scale, mix, threshold, clip: tau_c, beta, lambda, delta and the residual's
            bounds. The defaults are the official configuration's; its code's own defaults are
            (0.03, 0.2, 0.5, 0.02, (-0.5, 0.5)).

    Returns:
        Advantages, the selected tokens and e.  A token without any wrong hint keeps its advantage
        (the official code drops its sample instead: an empty logsumexp would select it).

    Reference:
        *RLCSD*, arXiv 2606.11709.

    Examples:
        >>> import torch, fused_sd
        >>> advantages, right = torch.tensor([1.0, 1.0, 0.2]), torch.tensor([-0.1, -1.0, -3.0])
        >>> wrong = torch.tensor([[-2.0], [-1.0], [-0.1]])  # under one wrong hint
        >>> found = fused_sd.rlcsd_advantages(advantages, right, wrong)
        >>> found.advantages  # raised where the right hint fits better; never turned into blame
        tensor([1.5000, 1.0000, 0.0000])
        >>> found.selected
        tensor([ True, False,  True])
    """
    checks.check_positive("temperature", temperature)
    for setting, number in (("scale", scale), ("mix", mix), ("threshold", threshold)):
        checks.check_finite(setting, number, "pass the configuration's number")
    checks.check_bounds("clip", clip, "pass the residual's lowest and highest value")
    tensor_checks.check_tensor("advantages", advantages)
    owner = advantages.shape, advantages.device, "advantages"
    tensor_checks.check_per_token("advantages", advantages, *owner)
    tensor_checks.check_tensor("correct_log_probs", correct_log_probs)
    tensor_checks.check_per_token("correct_log_probs", correct_log_probs.detach(), *owner)
    floats = tensor_checks.FLOATING
    tensor_checks.check_hints("wrong_log_probs", wrong_log_probs, floats, advantages)
    if wrong_mask is not None:
        tensor_checks.check_hints("wrong_mask", wrong_mask, (torch.bool,), advantages)
        if wrong_mask.shape != wrong_log_probs.shape:
            rule, got = f"be {tuple(wrong_log_probs.shape)}", tuple(wrong_mask.shape)
            checks.fail("wrong_mask", rule, got, "mark each wrong_log_probs")
    else:
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
    """IW-OPD's advantages (B, T): ``w_t A_t``, with more weight where a sequence begins to err.

    ``A_t = b_t - a_t`` of the sampled token and
    ``w_t = 1 + gamma (1 - sum_{u<t} |A_u| / sum_u |A_u|)``; 0 where the mask is.  Train on
    ``policy_loss`` with them as advantages, or on ``cross_entropy_loss`` with them times the mean's
    weights as ``token_weights``.  Both have the same gradient while the policy is the one that
    sampled; only ``cross_entropy_loss`` has the value that TRL logs, and no ratio afterwards.

    Args:
        teacher_log_probs: (B, T) b, of the sampled tokens by the teacher, nats.
        rollout_log_probs: (B, T) a, of the sampled tokens when they were sampled, nats.
        mask: (B, T), nonzero where a token counts.
        gamma: how much more the first error weighs; 0 is ``A_t`` alone.

    Raises:
        ValueError: when a log-probability that counts is not finite (on the CPU).

    Reference:
        *IW-OPD*, arXiv 2606.22600.

    Examples:
        >>> import torch, fused_sd
        >>> rollout = torch.tensor([[-1.0, -1.0, -1.0, -1.0]])
        >>> teacher = torch.tensor([[-1.0, -3.0, -3.0, -9.0]])  # disagrees from the second token on
        >>> fused_sd.iw_opd_advantages(teacher, rollout, torch.tensor([[1, 1, 1, 0]]), gamma=1.0)
        tensor([[ 0., -4., -3.,  0.]])
    """
    checks.check_non_negative("gamma", gamma, "0.5 is the paper's")
    tensor_checks.check_mask("mask", mask)
    for name, tensor in (("teacher", teacher_log_probs), ("rollout", rollout_log_probs)):
        tensor_checks.check_tensor(f"{name}_log_probs", tensor)
        owner = mask.shape, mask.device, "mask"
        tensor_checks.check_per_token(f"{name}_log_probs", tensor.detach(), *owner)
        if tensor_checks.is_readable(tensor) and not tensor.isfinite()[mask != 0].all():
            checks.fail(
                f"{name}_log_probs",
                "be finite wherever the mask is set",
                "a value that is not",
                "mask the token, or ask for the log-probability of that id",
            )
    counted = mask.to(torch.bool)
    gap = torch.where(counted, teacher_log_probs.detach() - rollout_log_probs.detach(), 0)
    size = gap.abs()
    before = size.cumsum(-1) - size
    whole = size.sum(-1, keepdim=True).clamp(min=1e-8)
    return (1 + gamma * (1 - before / whole)) * gap
