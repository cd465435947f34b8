"""What a self-distillation trainer asks of a completion's forward, and what it does with it.

The functions that return a function return a ``compute`` for ``Request``: called with hidden states
and head inside the model's forward.

Dimension key:  B sequences, T completion tokens, K entries, D hidden size
"""

import contextlib
import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fused_sd import (
    EntryLogProbs,
    ImportanceCap,
    LMHead,
    LossOutput,
    TokenLogProbs,
    divergence_loss,
    entry_log_probs,
    generalized_jsd,
    token_log_probs,
)
from fused_sd.checks import fail
from fused_sd.integrations.shared.output_head import Compute
from fused_sd.integrations.shared.packing import check_packing, pack_completions
from fused_sd.integrations.transformers import Request, completion_positions

DIVERGENCE_METRICS = ("student_entropy", "teacher_entropy", "forward_kl", "reverse_kl")


@dataclass(frozen=True, eq=False)
class CompletionForward:
    """A forward over prompt and completion that has not been made yet.

    Attributes:
        model: attached.
        input_ids, attention_mask: (B, L).
        length: T, of the completions.
        padding_free: run the backbone on one row without padding.  States of padding then are those
            of some token: ``compute`` has to give them weight 0.
    """

    model: nn.Module
    input_ids: Tensor
    attention_mask: Tensor
    length: int
    padding_free: bool = False

    def __call__(self, compute: Compute) -> Any:
        """Make it, and return what ``compute`` makes of the completion's states (B, T, D)."""
        positions = completion_positions(self.length)
        if self.padding_free:
            check_packing(self.model)
            packed = pack_completions(self.input_ids, self.attention_mask, self.length)
            inputs = packed.inputs(self.model)
            request = Request(compute, packed.index[:, positions])
        else:
            inputs = {"input_ids": self.input_ids, "attention_mask": self.attention_mask}
            request = Request(compute, positions)
        output = self.model(**inputs, use_cache=False, fused_sd=request)
        if not hasattr(output, "result"):
            fail(
                "model.forward",
                "be the one that attach gave it, or call it",
                f"another, which returned {type(output).__name__}",
                "for use_liger_kernel, which replaces it when training starts, set "
                'liger_kernel_config={"fused_linear_cross_entropy": False}; otherwise attach last',
            )
        return output.result


@dataclass(frozen=True, eq=False)
class Scores:
    """What is left of two forwards.

    Attributes:
        token_loss: (B, T) distillation loss, importance ratio included.
        log_probs: (B, T) of the completion by the student, where needed.
        loss: (), reduced already; None: reduce ``token_loss``, which then is differentiable.
        metrics: (B, T) each, detached.
    """

    token_loss: Tensor
    log_probs: Tensor | None
    loss: Tensor | None
    metrics: dict[str, Tensor]


def log_probs(
    token_ids: Tensor, mask: Tensor, temperature: float, *, entropy: bool = False
) -> Callable[[Tensor, LMHead], TokenLogProbs]:
    """Log-probabilities (B, T) of the completion."""

    def compute(hidden: Tensor, head: LMHead) -> TokenLogProbs:
        return token_log_probs(
            hidden, head, token_ids, temperature=temperature, entropy=entropy, token_weights=mask
        )

    return compute


def entries(
    k_or_ids: int | Tensor, mask: Tensor, temperature: float
) -> Callable[[Tensor, LMHead], EntryLogProbs]:
    """Log-probabilities (B, T, K) of the top-k, or of given entries."""

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
    """The student's entries, and its log-probabilities of the completion where ids are given."""

    def compute(hidden: Tensor, head: LMHead) -> tuple[EntryLogProbs, Tensor | None]:
        own = entries(k_or_ids, mask, temperature)(hidden, head)
        if token_ids is None:
            return own, None
        # an importance ratio is a constant: its log-probabilities need no backward
        with contextlib.nullcontext() if differentiable else torch.no_grad():
            return own, log_probs(token_ids, token_mask, temperature)(hidden, head).log_probs

    return compute


def with_head(outlives_forward: bool) -> Callable[[Tensor, LMHead], Any]:
    """Hidden states, and the head they belong to.

    Args:
        outlives_forward: copy the head: its weight is sharded again after this forward.
    """

    def compute(hidden: Tensor, head: LMHead) -> tuple[Tensor, "HeldHead"]:
        if outlives_forward:
            bias = None if head.bias is None else head.bias.detach().clone()
            head = dataclasses.replace(head, weight=head.weight.detach().clone(), bias=bias)
        return hidden, HeldHead(head)

    return compute


class HeldHead:
    """A head on its way out of a forward, in a wrapping that no cast of outputs looks into."""

    def __init__(self, head: LMHead) -> None:
        self.head = head

    def beside(self, student: LMHead) -> LMHead:
        """The head as the teacher's: the student's own where they are one, a constant otherwise."""
        head = self.head
        if head.weight is student.weight:
            return student
        bias = None if head.bias is None else head.bias.detach()
        return dataclasses.replace(head, weight=head.weight.detach(), bias=bias)


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
    """Divergence over the vocabulary, summed with the weights.

    Args:
        importance: old log-probabilities (B, T) and the ratio's cap.
        policy_mask: where log-probabilities of the completion are needed as well.
        observed: form entropies and KLs for logging.
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
            metrics=metrics,
        )
        if policy_mask is None:
            return output, None
        return output, log_probs(token_ids, policy_mask, temperature)(hidden, head).log_probs

    return compute


def sequence_mean_weights(mask: Tensor) -> Tensor:
    """Weights (B, T) of TRL's reduction: each sequence's masked mean, averaged over all B rows."""
    count = mask.sum(-1, keepdim=True).clamp(min=1)
    return mask / (count * mask.size(0))


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
    """TRL's clipped policy loss of SDPO, from log-probabilities."""
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
    """Means over the masked tokens of all processes; none where no token is masked in."""
    sums = [(values * mask).sum().float() for values in metrics.values()]
    gathered = gather(torch.stack([*sums, mask.sum().float()])[None]).sum(0)
    *totals, count = gathered.tolist()
    return {name: total / count for name, total in zip(metrics, totals)} if count else {}
