"""From hidden states to a chunk of logits and back: the only GEMMs of the library.

Logits leave the GEMM in fp32 whatever the operands' dtype (float64 operands stay in float64), and
every gradient is accumulated in that same dtype.  Rounding happens once, when a gradient is handed
back to autograd.

Dimension key:  N tokens, C tokens in a chunk, D hidden size, V vocabulary, K chosen columns
"""

from collections.abc import Callable

import torch
from torch import Tensor

from fused_sd.head.lm_head import Shaping

DotProducts = Callable[[Tensor, Tensor, Tensor], Tensor]  # (C, D), (V, D), ids (C, K) -> (C, K)


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of logits, statistics and accumulators: fp32, or float64 for float64 operands."""
    return torch.float64 if dtype == torch.float64 else torch.float32


class Projection:
    """One side's hidden states and head inside the chunk loop.

    A GPU multiplies 16-bit operands with fp32 sums.  On a CPU, which cannot, the operands are
    widened to fp32 first; a head that both sides share is widened once.
    """

    def __init__(
        self,
        hidden: Tensor,  # (N, D)
        weight: Tensor,  # (V, D)
        bias: Tensor | None,  # (V,)
        shaping: Shaping,
        other: "Projection | None" = None,
    ) -> None:
        wide = accumulation_dtype(hidden.dtype)
        self.dtype = operand_dtype(hidden)
        self.hidden, self.given, self.shaping = hidden, weight, shaping
        self.weight: Tensor
        if other is not None and self._has_head_of(other):
            self.weight = other.weight
        else:
            self.weight = weight.to(self.dtype)
        self.bias = None if bias is None else bias.to(wide)

    @property
    def vocab(self) -> int:
        return self.weight.shape[0]

    def _has_head_of(self, other: "Projection") -> bool:
        mine, theirs = self.given, other.given
        return (
            mine.data_ptr() == theirs.data_ptr()
            and mine.shape == theirs.shape
            and mine.stride() == theirs.stride()
            and self.dtype == other.dtype
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
        if self.bias is not None:
            logits += self.bias[known]
        return self._shape_(logits).masked_fill_(columns >= self.vocab, -torch.inf)

    def logits(self, rows: slice, out: Tensor) -> Tensor:
        """Write the chunk's logits into ``out`` (C, >= V)."""
        matmul(self.chunk(rows), self.weight.t(), out[:, : self.vocab])
        return self.finish_(out)

    def finish_(self, out: Tensor) -> Tensor:
        """Turn products (C, >= V) into logits in place, and the columns behind them into -inf."""
        logits = out[:, : self.vocab]
        if self.bias is not None:
            logits += self.bias
        self._shape_(logits)
        out[:, self.vocab :] = -torch.inf
        return out

    def _shape_(self, products: Tensor) -> Tensor:
        factor, cap = self.shaping
        if cap is not None:
            products.mul_(factor / cap).tanh_().mul_(cap)
        elif factor != 1:
            products *= factor
        return products


def operand_dtype(hidden: Tensor) -> torch.dtype:
    """The dtype of the GEMMs' operands, and of the logits' gradients."""
    return hidden.dtype if hidden.is_cuda else accumulation_dtype(hidden.dtype)


def matmul(a: Tensor, b: Tensor, out: Tensor) -> None:
    """``out = a @ b`` with the products summed in the dtype of ``out``."""
    if a.dtype == out.dtype:
        torch.mm(a, b, out=out)
    else:
        torch.mm(a, b, out_dtype=out.dtype, out=out)


def matmul_add_(a: Tensor, b: Tensor, out: Tensor) -> None:
    """``out += a @ b`` with the products summed in the dtype of ``out``."""
    if a.dtype == out.dtype:
        out.addmm_(a, b)
    else:
        torch.addmm(out, a, b, out_dtype=out.dtype, out=out)
