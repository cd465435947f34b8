"""Batches that trainers meet, as the official codes' arithmetic and the fused losses take them.

Dimension key:  B sequences, T tokens of a sequence, D hidden size, V vocabulary, K wrong hints
"""

from dataclasses import dataclass, fields, replace

import torch
from closeness import assert_close
from torch import Tensor

HIDDEN, VOCAB = 8, 67  # a prime vocabulary: no block of columns divides it
FLOAT = torch.float64


@dataclass(frozen=True, eq=False)
class Batch:
    """A micro-batch of a self-distillation trainer, in float64."""

    hidden: Tensor  # (B, T, D), differentiated
    head: Tensor  # (V, D), differentiated
    teacher_hidden: Tensor  # (B, T, D)
    teacher_head: Tensor  # (V, D)
    token_ids: Tensor  # (B, T)
    mask: Tensor  # (B, T) of the response
    taught: Tensor  # (B,) whether the sequence has a teacher
    advantages: Tensor  # (B, T)
    old: Tensor  # (B, T) log-probs of the tokens when they were sampled, as the trainer found them
    rollout: Tensor  # (B, T) the same, as the sampling engine found them
    reference: Tensor  # (B, T) of a reference model
    correct: Tensor  # (B, T) of a teacher with a correct hint
    wrong: Tensor  # (B, T, K) of teachers with wrong hints
    wrong_mask: Tensor  # (B, K)

    @property
    def sides(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What a divergence of the library takes."""
        return self.hidden, self.head, self.teacher_hidden, self.teacher_head

    @property
    def policy(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What a policy loss of the library takes."""
        return self.hidden, self.head, self.token_ids, self.advantages

    @property
    def sampled(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.hidden, self.head, self.token_ids

    @property
    def leaves(self) -> tuple[Tensor, Tensor]:
        return self.hidden, self.head

    def student_logits(self, temperature: float = 1.0) -> Tensor:
        """(B, T, V), differentiable."""
        return self.hidden @ self.head.t() / temperature

    @property
    def teacher(self) -> tuple[Tensor, Tensor]:
        return self.teacher_hidden, self.teacher_head

    def teacher_logits(self, temperature: float = 1.0) -> Tensor:
        """(B, T, V), a constant."""
        return (self.teacher_hidden @ self.teacher_head.t()).detach() / temperature

    def log_prob(self, logits: Tensor) -> Tensor:
        """(B, T) of the sampled tokens."""
        return logits.log_softmax(-1).gather(-1, self.token_ids[..., None])[..., 0]

    def with_(self, **tensors: Tensor) -> "Batch":
        """The same batch with other tensors, on fresh leaves."""
        moved = {name: getattr(self, name).detach().clone() for name in ("hidden", "head")}
        moved |= {name: tensor.detach() for name, tensor in tensors.items()}
        for name in ("hidden", "head"):
            moved[name].requires_grad_(True)
        return replace(self, **moved)

    def with_policies(self, **log_probs: Tensor) -> "Batch":
        """The same leaves, with the log-probabilities of other policies."""
        return replace(self, **log_probs)

    def poisoned(self) -> "Batch":
        """NaN, infinities and ids of no token wherever the mask is 0."""
        garbage = (torch.nan, torch.inf, -torch.inf)
        away = self.mask == 0
        changed = {"token_ids": self.token_ids.masked_fill(away, -100)}
        for at, field in enumerate(fields(self)):
            tensor = getattr(self, field.name)
            if tensor.shape[:2] == self.mask.shape and field.name not in ("mask", "token_ids"):
                behind = away.view(*away.shape, *[1] * (tensor.dim() - 2))
                changed[field.name] = tensor.detach().masked_fill(behind, garbage[at % 3])
        return self.with_(**changed)


def make_batch(rows: list[list[int]], taught: list[int] | None = None, peak: float = 3.0) -> Batch:
    """A batch whose mask is ``rows``; log-probabilities lie around the student's own."""
    mask = torch.tensor(rows, dtype=FLOAT)
    signs = torch.tensor([[1.0], [-1.0], [1.0], [-1.0]], dtype=FLOAT)[: len(rows)]
    shape, num_hints = mask.shape, 3

    def normal(*sizes: int) -> Tensor:
        return torch.randn(*sizes, dtype=FLOAT)

    hidden, head = normal(*shape, HIDDEN), normal(VOCAB, HIDDEN) * peak / HIDDEN**0.5
    teacher_hidden = hidden + 0.4 * normal(*shape, HIDDEN)
    token_ids = torch.randint(VOCAB, shape)
    own = (hidden @ head.t()).log_softmax(-1).gather(-1, token_ids[..., None])[..., 0]
    old = (own + 0.8 * normal(*shape)).clamp(max=-1e-3)
    return Batch(
        hidden.requires_grad_(True),
        head.requires_grad_(True),
        teacher_hidden,
        head.detach() + 0.02 * normal(VOCAB, HIDDEN),
        token_ids,
        mask,
        torch.tensor(taught or [1] * len(rows), dtype=FLOAT),
        (normal(shape[0], 1).abs() * signs).expand(shape).clone(),
        old,
        old + 0.6 * normal(*shape),
        own + 0.5 * normal(*shape),
        own + 0.05 * normal(*shape),
        own[..., None] + 0.05 * normal(*shape, num_hints),
        torch.tensor([[1, 1, 1], [1, 0, 0], [0, 1, 1], [1, 0, 1]])[: len(rows)].bool(),
    )


BATCHES = {
    "every token": lambda: make_batch([[1, 1, 1, 1, 1]] * 4),
    "ragged": lambda: make_batch(
        [[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0], [1, 0, 0, 0, 0]]
    ),
    "masked, two sequences without a teacher": lambda: make_batch(
        [[1, 0, 0, 1, 1], [1, 1, 1, 1, 0], [0, 0, 1, 1, 1], [1, 1, 1, 1, 1]], [1, 0, 1, 0]
    ),
    "an empty sequence": lambda: make_batch([[1, 1, 1, 1, 1], [0, 0, 0, 0, 0], [1, 1, 1, 1, 0]]),
    "one sequence": lambda: make_batch([[1, 1, 1, 1, 1, 0]]),
    "one token": lambda: make_batch([[0, 0, 1]]),
    "peaked": lambda: make_batch([[1, 1, 1, 1], [1, 1, 1, 0]], peak=14.0),
    "nothing": lambda: make_batch([[0, 0, 0], [0, 0, 0]]),
}  # fmt: skip


def assert_same(found: Tensor, exact: Tensor, batch: Batch, plain: Batch) -> None:
    """A fused loss on ``batch`` is official arithmetic on ``plain``, and so are its gradients.

    Without any token that counts, official codes give NaN or 0; the fused losses give 0, attached.
    """
    gradients = torch.autograd.grad(found, batch.leaves)
    if not plain.mask.any():
        assert found == 0
        assert all((gradient == 0).all() for gradient in gradients)
        return
    assert_close(found, exact, FLOAT, "loss")
    for value, truth in zip(gradients, torch.autograd.grad(exact, plain.leaves), strict=True):
        if truth.any():
            assert_close(value, truth, FLOAT, "gradient")
        else:  # no token is left, as where SDFT skips the only one
            assert not value.any()
