"""What the drop-in trainers compute in a forward, beside log-probabilities, and how they average.

``entries``, ``student_entries`` and ``full_divergence`` each return a ``compute`` for
``CompletionForward``: a function that is called with hidden states and head inside the model's
forward.

Dimension key:  B sequences, T completion tokens, K entries, D hidden size
"""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fused_sd import (
    EntryLogProbs,
    ImportanceCap,
    LMHead,
    LossOutput,
    aggregation_weights,
    divergence_loss,
    entry_log_probs,
    generalized_jsd,
)
from fused_sd.integrations.shared.completion_scores import HeldHead, log_probs

DIVERGENCE_METRICS = ("student_entropy", "teacher_entropy", "forward_kl", "reverse_kl")


@dataclass(frozen=True, eq=False)
class Scores:
    """What a distillation loss keeps of the student's and the teacher's forward.

    Attributes:
        token_loss: (B, T) distillation loss of each token, times its importance ratio.
        log_probs: (B, T) log-probabilities of the completion by the student, or None where nothing
            needs them.
        loss: (), the reduced loss; None: ``token_loss`` is differentiable and still to be reduced.
        metrics: (B, T) each, detached.
    """

    token_loss: Tensor
    log_probs: Tensor | None
    loss: Tensor | None
    metrics: dict[str, Tensor]


def entries(
    k_or_ids: int | Tensor, mask: Tensor, temperature: float
) -> Callable[[Tensor, LMHead], EntryLogProbs]:
    """Return a ``compute`` for log-probabilities (B, T, K): of the top k, or of given entries.

    Args:
        k_or_ids: k, or token ids (B, T, K).
        mask: (B, T), 0 where no log-probability is needed.
        temperature: divides the logits.
    """

    def compute(hidden: Tensor, head: LMHead) -> EntryLogProbs:
        return entry_log_probs(hidden, head, k_or_ids, temperature=temperature, token_weights=mask)

    return compute


def student_entries(
    k_or_ids: int | Tensor,
    mask: Tensor,
    temperature: float,
    *,
    token_ids: Tensor | None,
    token_mask: Tensor,
    differentiable: bool = False,
) -> Callable[[Tensor, LMHead], tuple[EntryLogProbs, Tensor | None]]:
    """Return a ``compute`` for the student's entries, and the completion's log-probabilities.

    Args:
        k_or_ids, mask, temperature: as in ``entries``.
        token_ids: (B, T), the completion; None: no log-probabilities of it are needed.
        token_mask: (B, T), 0 where no log-probability of the completion is needed.
        differentiable: whether the completion's log-probabilities need a gradient.
    """

    def compute(hidden: Tensor, head: LMHead) -> tuple[EntryLogProbs, Tensor | None]:
        own = entries(k_or_ids, mask, temperature)(hidden, head)
        if token_ids is None:
            return own, None
        # an importance ratio is a constant of the loss: its log-probabilities need no backward
        with contextlib.nullcontext() if differentiable else torch.no_grad():
            return own, log_probs(token_ids, token_mask, temperature)(hidden, head).log_probs

    return compute


def full_divergence(
    teacher_hidden: Tensor,
    teacher_head: HeldHead,
    alpha: float,
    temperature: float,
    *,
    token_ids: Tensor,
    token_weights: Tensor,
    importance: tuple[Tensor, float] | None,
    policy_mask: Tensor | None,
    observed: bool,
) -> Callable[[Tensor, LMHead], tuple[LossOutput, Tensor | None]]:
    """Return a ``compute`` for the divergence over the vocabulary, a weighted sum over tokens.

    Args:
        teacher_hidden: (B, T, D).
        teacher_head: the head of those states.
        alpha: 0 for KL(t||s), 1 for KL(s||t), between them the generalised Jensen-Shannon.
        temperature: divides both sides' logits.
        token_ids: (B, T), the completion.
        token_weights: (B, T).
        importance: old log-probabilities (B, T) and the ratio's cap, or None for no ratio.
        policy_mask: (B, T), where the completion's log-probabilities are needed too; None: nowhere.
        observed: compute entropies and KLs for logging.
    """
    metrics = DIVERGENCE_METRICS if observed else ()
    cap = None
    if importance is not None:
        metrics, cap = (*metrics, "importance_ratio"), ImportanceCap(*importance)

    def compute(hidden: Tensor, head: LMHead) -> tuple[LossOutput, Tensor | None]:
        output = divergence_loss(
            hidden,
            head,
            teacher_hidden,
            teacher_head.beside(head),
            divergence=generalized_jsd(alpha),
            token_weights=token_weights,
            token_ids=token_ids,
            importance=cap,
            temperature=temperature,
            reduction="sum",
            metrics=metrics,
        )
        if policy_mask is None:
            return output, None
        return output, log_probs(token_ids, policy_mask, temperature)(hidden, head).log_probs

    return compute


def sequence_mean_weights(mask: Tensor) -> Tensor:
    """Return weights (B, T) of TRL's reduction: each sequence's mean, averaged over all B rows."""
    return aggregation_weights(mask, "all_sequences_mean_token_mean")


def clipped_policy_loss(
    log_probs: Tensor,  # (B, T)
    old_log_probs: Tensor | None,  # (B, T)
    advantages: Tensor,  # (B,) or (B, T)
    mask: Tensor,  # (B, T)
    *,
    epsilon: tuple[float, float],
    level: str,
    loss_type: str,
    max_length: int,
) -> Tensor:
    """Compute the clipped policy loss of TRL's SDPOTrainer from log-probabilities.

    ``SDPOTrainer._compute_policy_loss`` (read in TRL 1.6 to 1.16) does the same from logits, which
    do not exist here.

    Args:
        epsilon: lower and upper clip of the ratio, as distances from 1.
        level: ``"token"``, or ``"sequence"`` for one ratio for each sequence, the mean over it.
        loss_type: TRL's name of the average.
        max_length: what "dr_grpo" takes for the length of each sequence.
    """
    old_log_probs = log_probs.detach() if old_log_probs is None else old_log_probs
    advantages = advantages[:, None] if advantages.dim() == 1 else advantages
    log_ratio = log_probs - old_log_probs
    lengths = mask.sum(-1, keepdim=True).clamp(min=1.0)
    if level == "sequence":
        log_ratio = (log_ratio * mask).sum(-1, keepdim=True) / lengths
    ratio = log_ratio.exp()
    clipped = ratio.clamp(1 - epsilon[0], 1 + epsilon[1])
    token_loss = -torch.min(ratio * advantages, clipped * advantages)
    if loss_type == "grpo":
        return ((token_loss * mask).sum(-1, keepdim=True) / lengths).mean()
    total = (token_loss * mask).sum()
    if loss_type in ("bnpo", "dapo"):
        return total / mask.sum().clamp(min=1.0)
    if loss_type == "dr_grpo":
        return total / (mask.size(0) * max_length)
    raise ValueError(f"Unsupported loss_type: {loss_type}")


def masked_means(
    metrics: dict[str, Tensor], mask: Tensor, gather: Callable[[Tensor], Tensor]
) -> dict[str, float]:
    """Average metrics over the tokens of the mask on all processes: a collective call.

    Args:
        metrics: (B, T) each.
        mask: (B, T), 1 where a token counts.
        gather: accelerate's ``gather``.

    Returns:
        The means, or {} where no process has a token.
    """
    sums = [(values * mask).sum().float() for values in metrics.values()]
    gathered = gather(torch.stack([*sums, mask.sum().float()])[None]).sum(0)
    *totals, count = gathered.tolist()
    return {name: total / count for name, total in zip(metrics, totals)} if count else {}
