"""A loss and its gradients in float64, from all logits of a few tokens, and distances from them.

dweight is never held in float64: it is computed from dlogits one slab of rows at a time.

Dimension key:  N tokens, D hidden size, V vocabulary
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from fused_sd import reference
from fused_sd.measuring.realistic import slabs

SLAB = 2**13  # rows of the head that are converted to float64 at a time
ELEMENTS = 2**22  # logits that a definition is applied to at a time

# maps the student's and teacher's logits of the tokens in the slice to one loss a token
TokenLoss = Callable[[Tensor, Tensor, slice], Tensor]


class Exact(NamedTuple):
    """The exact loss, and its gradient w.r.t. the student's logits."""

    loss: float
    size: float  # the weighted sum of the token losses' absolute values
    dlogits: Tensor  # (N, V)


@dataclass
class Distance:
    """Distance of a tensor from the truth, added up over parts of the tensor."""

    error: float = 0.0  # squared norm of the difference
    size: float = 0.0  # squared norm of the truth
    worst: float = 0.0  # largest absolute difference of an element
    largest: float = 0.0  # largest absolute element of the truth

    def add(self, value: Tensor, truth: Tensor) -> None:
        """Add one part."""
        difference = value - truth
        self.error += float(difference.square().sum())
        self.size += float(truth.square().sum())
        self.worst = max(self.worst, float(difference.abs().max()))
        self.largest = max(self.largest, float(truth.abs().max()))

    def by_norm(self) -> float:
        """Relative error by norm; absolute if the truth is 0."""
        return (self.error / self.size) ** 0.5 if self.size else self.error

    def by_element(self) -> float:
        """Error of the worst element, relative to the largest; absolute if the truth is 0."""
        return self.worst / self.largest if self.largest else self.worst


def exact(token_loss: TokenLoss, student: Tensor, teacher: Tensor, weights: Tensor) -> Exact:
    """Return the weighted sum of the token losses on float64 logits (N, V), and its gradient."""
    dlogits, loss, size = torch.empty_like(student), 0.0, 0.0
    for rows in slabs(len(weights), max(1, ELEMENTS // student.shape[1])):
        leaf = student[rows].detach().requires_grad_(True)
        weighted = weights[rows] * token_loss(leaf, teacher[rows], rows)
        (dlogits[rows],) = torch.autograd.grad(weighted.sum(), leaf)
        loss += float(weighted.detach().sum())
        size += float(weighted.detach().abs().sum())
    return Exact(loss, size, dlogits)


def logits(hidden: Tensor, weight: Tensor) -> Tensor:
    """Float64 logits (N, V)."""
    return torch.cat([reference.logits(hidden, part) for part in weight.split(SLAB)], -1)


def rounded_logits(hidden: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Float64 logits (N, V) of an fp32 GEMM, rounded once to a 16-bit dtype."""
    wide = hidden.float()
    parts = [(wide @ part.float().T).to(dtype) for part in weight.split(SLAB)]
    return torch.cat(parts, -1).double()


def hidden_gradient(dlogits: Tensor, weight: Tensor) -> Tensor:
    """``dlogits @ weight`` in float64: (N, D)."""
    gradient = dlogits.new_zeros(len(dlogits), weight.shape[1])
    for rows in slabs(len(weight), SLAB):
        gradient += dlogits[:, rows] @ weight[rows].double()
    return gradient


def weight_gradient(dlogits: Tensor, hidden: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Yield ``dlogits.T @ hidden`` in float64, some rows of the head at a time."""
    states = hidden.double()
    for rows in slabs(dlogits.shape[1], SLAB):
        yield rows, dlogits[:, rows].T @ states
