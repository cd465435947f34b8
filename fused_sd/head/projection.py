"""From hidden states to a chunk of logits and back: the only GEMMs of the library.

Logits leave the GEMM in fp32 whatever the operands' dtype (float64 operands stay in float64), and
every gradient is accumulated in that same dtype.  Rounding happens once, when a gradient is handed
back to autograd.

Dimension key:  N tokens, C tokens in a chunk, D hidden size, V vocabulary, K chosen columns
"""

from collections.abc import Callable

import torch
from torch import Tensor

from fused_sd.head.lm_head import Shaping, is_same

DotProducts = Callable[[Tensor, Tensor, Tensor], Tensor]  # (C, D), (V, D), ids (C, K) -> (C, K)


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of logits, statistics and accumulators: fp32, or float64 for float64 operands."""
    return torch.float64 if dtype == torch.float64 else torch.float32


class Projection:
    """One side's hidden states and head inside the chunk loop.

    A GPU multiplies 16-bit operands with fp32 sums.  On a CPU, which cannot, the operands are
    widened to fp32 first; a head that both sides share is widened once.  The logits' factor is the
    GEMM's own, and a bias is what the GEMM adds its products to, so that neither needs a pass over
    the logits.
    """

    def __init__(
        self,
        hidden: Tensor,  # (N, D)
        weight: Tensor,  # (V, D)
        bias: Tensor | None,  # (V,)
        shaping: Shaping,
        other: "Projection | None" = None,
    ) -> None:
        self.dtype = operand_dtype(hidden)
        self.hidden, self.given, self.cap = hidden, (weight, bias), shaping.cap
        self.factor = shaping.factor / (shaping.cap or 1.0)  # of the products of states and head
        self.weight: Tensor
        self.bias: Tensor | None = None  # (V,) times the factor, fp32 or fp64
        if other is not None and self.dtype == other.dtype and is_same(weight, other.given[0]):
            self.weight = other.weight
        else:
            self.weight = weight.to(self.dtype)
        if bias is not None:
            self.bias = bias.to(accumulation_dtype(hidden.dtype)) * self.factor

    @property
    def vocab(self) -> int:
        return self.weight.shape[0]

    def equals(self, other: "Projection") -> bool:
        """Whether equal states get equal logits."""
        return (
            self.weight is other.weight
            and (self.factor, self.cap) == (other.factor, other.cap)
            and is_same(self.given[1], other.given[1])
        )

    def chunk(self, rows: slice | Tensor) -> Tensor:
        """Hidden states (C, D) of a chunk, or of chosen tokens."""
        return self.hidden[rows].to(self.dtype)

    def entry_logits(self, rows: slice, columns: Tensor, dot_products: DotProducts) -> Tensor:
        """The chunk's logits (C, K) at given columns, -inf behind this side's vocabulary."""
        if self.vocab == 0:  # a rank whose rows are all padding
            wide = accumulation_dtype(self.dtype)
            return self.hidden.new_full(columns.shape, -torch.inf, dtype=wide)
        known = columns.clamp(max=self.vocab - 1)
        logits = dot_products(self.chunk(rows), self.weight, known)
        if self.factor != 1:
            logits *= self.factor
        if self.bias is not None:
            logits += self.bias[known]
        return self._capped_(logits).masked_fill_(columns >= self.vocab, -torch.inf)

    def project(self, states: Tensor, out: Tensor) -> Tensor:
        """Write the logits of states (C, D) into the first V columns of ``out``; return ``out``."""
        logits = out[:, : self.vocab]
        if self.bias is None:
            matmul(states, self.weight.t(), logits, self.factor)
        else:
            matmul_add_(states, self.weight.t(), logits.copy_(self.bias), self.factor)
        self._capped_(logits)
        return out

    def _capped_(self, logits: Tensor) -> Tensor:
        return logits if self.cap is None else logits.tanh_().mul_(self.cap)


def operand_dtype(hidden: Tensor) -> torch.dtype:
    """The dtype of the GEMMs' operands, and of the logits' gradients."""
    return hidden.dtype if hidden.is_cuda else accumulation_dtype(hidden.dtype)


def matmul(a: Tensor, b: Tensor, out: Tensor, factor: float = 1.0) -> None:
    """``out = factor * a @ b`` with the products summed in the dtype of ``out``."""
    if factor != 1:
        _addmm(a, b, out, beta=0.0, alpha=factor)
    elif a.dtype == out.dtype:
        torch.mm(a, b, out=out)
    else:
        torch.mm(a, b, out_dtype=out.dtype, out=out)


def matmul_add_(a: Tensor, b: Tensor, out: Tensor, factor: float = 1.0) -> None:
    """``out += factor * a @ b`` with the products summed in the dtype of ``out``."""
    _addmm(a, b, out, beta=1.0, alpha=factor)


def _addmm(a: Tensor, b: Tensor, out: Tensor, **factors: float) -> None:
    if a.dtype == out.dtype:
        out.addmm_(a, b, **factors)
    else:
        torch.addmm(out, a, b, out_dtype=out.dtype, out=out, **factors)
