"""Inputs that losses meet: ragged sizes, peaked rows, ties, masks, padding."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fused_sd import LMHead


@dataclass
class Case:
    """A student and a teacher on the same tokens, in some dtype."""

    hidden: Tensor  # (N, D)
    weight: Tensor  # (V, D)
    bias: Tensor | None  # (V,)
    teacher_hidden: Tensor  # (N, D')
    teacher_weight: Tensor  # (V', D')
    token_ids: Tensor  # (N,)
    old_log_probs: Tensor  # (N,)
    token_weights: Tensor  # (N,)
    logit_scale: float = 1.0
    softcap: float | None = None
    valid_vocab: int | None = None

    @property
    def head(self) -> LMHead:
        return LMHead(self.weight, self.bias, self.logit_scale, self.softcap, self.valid_vocab)

    @property
    def teacher_head(self) -> LMHead:
        return LMHead(self.teacher_weight, None, self.logit_scale, self.softcap, self.valid_vocab)

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        """What is differentiated."""
        return tuple(t for t in (self.hidden, self.weight, self.bias) if t is not None)

    def to(self, dtype: torch.dtype) -> "Case":
        """The same numbers in another dtype, as fresh leaves."""
        moved = {
            name: value.detach().to(dtype)
            for name, value in vars(self).items()
            if isinstance(value, Tensor) and value.is_floating_point()
        }
        for name in ("hidden", "weight", "bias"):
            if name in moved:
                moved[name].requires_grad_(True)
        return replace(self, **moved)


def make_case(
    num_tokens: int = 7,
    hidden_size: int = 12,
    vocab: int = 67,
    *,
    teacher_hidden_size: int | None = None,
    teacher_vocab: int | None = None,
    gap: float = 0.5,
    peak: float = 3.0,
    bias: bool = False,
    dtype: torch.dtype = torch.float64,
    **head: float | int | None,
) -> Case:
    """Random states whose largest logits are near ``peak`` standard deviations.

    The teacher is the student a ``gap`` away, unless its sizes are its own.
    """
    hidden = torch.randn(num_tokens, hidden_size, dtype=torch.float64)
    weight = torch.randn(vocab, hidden_size, dtype=torch.float64) * peak / hidden_size**0.5
    teacher_hidden = hidden + gap * torch.randn_like(hidden)
    teacher_weight = weight
    if teacher_hidden_size or teacher_vocab:
        size, rows = teacher_hidden_size or hidden_size, teacher_vocab or vocab
        teacher_hidden = torch.randn(num_tokens, size, dtype=torch.float64)
        teacher_weight = torch.randn(rows, size, dtype=torch.float64) * peak / size**0.5
    weights = torch.rand(num_tokens, dtype=torch.float64) + 0.5
    weights[1::3] = 0
    case = Case(
        hidden,
        weight,
        torch.randn(vocab, dtype=torch.float64) if bias else None,
        teacher_hidden,
        teacher_weight,
        torch.randint(min(vocab, teacher_vocab or vocab), (num_tokens,)),
        torch.log(torch.rand(num_tokens, dtype=torch.float64)),
        weights,
        **head,
    )
    # values that every dtype holds, so that all dtypes compute the same loss
    return case.to(torch.bfloat16).to(dtype)
