"""Forwards over prompt and completion, and the scores that a self-distillation trainer needs.

``CompletionForward`` is a forward that has not run yet.  ``log_probs``, ``entries``,
``student_entries``, ``with_head`` and ``full_divergence`` each return a ``compute`` to run it with:
a function that is called with hidden states and head inside the model's forward.

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
    """A forward over prompts and completions that has not run yet.

    Attributes:
        model: a model that ``attach`` has seen, or a wrapper around one.
        input_ids, attention_mask: (B, L).
        length: T, the length of the padded completions at the end of each row.
        padding_free: run the backbone on one row without padding.  The states at padding are then
            those of some other token, so that ``compute`` has to give them weight 0.
    """

    model: nn.Module
    input_ids: Tensor
    attention_mask: Tensor
    length: int
    padding_free: bool = False

    def __call__(self, compute: Compute) -> Any:
        """Run the model, and return what ``compute`` returns for the completions' states (B, T, D).

        Raises:
            ValueError: something has replaced the forward that ``attach`` installed.
        """
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
        # Trainer applies Liger when training starts, after ``attach``: its fused head replaces the
        # instance's forward, swallows unknown keywords and returns logits.
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


def log_probs(
    token_ids: Tensor, mask: Tensor, temperature: float, *, entropy: bool = False
) -> Callable[[Tensor, LMHead], TokenLogProbs]:
    """Return a ``compute`` for the log-probabilities (B, T) of the completion.

    Args:
        token_ids: (B, T).
        mask: (B, T), 0 where no log-probability is needed.
        temperature: divides the logits.
        entropy: also compute the entropy (B, T).
    """

    def compute(hidden: Tensor, head: LMHead) -> TokenLogProbs:
        return token_log_probs(
            hidden, head, token_ids, temperature=temperature, entropy=entropy, token_weights=mask
        )

    return compute


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


def with_head(outlives_forward: bool) -> Callable[[Tensor, LMHead], Any]:
    """Return a ``compute`` that returns the hidden states and their head.

    Args:
        outlives_forward: copy the head's weight.  FSDP and ZeRO-3 shard it again when this forward
            ends, while the loss reads it later, in the student's forward.
    """

    def compute(hidden: Tensor, head: LMHead) -> tuple[Tensor, "HeldHead"]:
        if outlives_forward:
            bias = None if head.bias is None else head.bias.detach().clone()
            head = dataclasses.replace(head, weight=head.weight.detach().clone(), bias=bias)
        return hidden, HeldHead(head)

    return compute


class HeldHead:
    """Carries a head out of a forward.

    Wrappers go through the tuples and dicts that a forward returns, FSDP1 and DDP through
    dataclasses too.  accelerate's autocast casts all 16-bit tensors that it finds to fp32, which
    would copy the weight and hide that both sides share it.  Other objects are left alone.
    """

    def __init__(self, head: LMHead) -> None:
        self.head = head

    def beside(self, student: LMHead) -> LMHead:
        """Return the head for a loss in the student's forward, where ``student`` is live.

        Teacher and student share one weight where the teacher is live or a LoRA adapter.  The loss
        recognises that by the weight's identity, and then needs no second head.  Another teacher's
        head is detached, since a loss refuses a teacher that requires a gradient.
        """
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
            metrics=metrics,
        )
        if policy_mask is None:
            return output, None
        return output, log_probs(token_ids, policy_mask, temperature)(hidden, head).log_probs

    return compute


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
