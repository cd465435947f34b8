"""From hidden states to a chunk of logits and back: the only GEMMs of the library.

Logits leave the GEMM in fp32 whatever the operands' dtype (float64 operands stay in float64), and
every gradient is accumulated in that same dtype: rounding happens once, where a gradient is handed
back to autograd.

Dimension key:  N tokens, C tokens in a chunk, D hidden size, V vocabulary
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from fused_sd import specs, tensor_checks

DotProducts = Callable[[Tensor, Tensor, Tensor], Tensor]  # (C, D), (V, D), ids (C, K) -> (C, K)


@dataclass(frozen=True, eq=False)
class LMHead:
    """An output projection with what some models do to its product.

    ``logits = softcap * tanh(logit_scale * (hidden @ weight.T + bias) / softcap)``; without a
    soft-cap just the scaled product.  Accepted wherever a (V, D) weight is.

    Args:
        weight: (V, D).
        bias: (V,), or None.
        logit_scale: multiplies the logits (Cohere's ``logit_scale``, the inverse of Granite's
            ``logits_scaling``).
        softcap: Gemma's ``final_logit_softcapping``, or None.
        valid_vocab: number of leading rows that are tokens; the padding rows behind them have no
            probability and get no gradient.  None: all V.

    Raises:
        ValueError: when a shape, a dtype or a number is out of range.
    """

    weight: Tensor
    bias: Tensor | None = None
    logit_scale: float = 1.0
    softcap: float | None = None
    valid_vocab: int | None = None

    def __post_init__(self) -> None:
        tensor_checks.check_head(self.weight, self.bias)
        tensor_checks.check_shaping(
            self.weight.shape[0], self.logit_scale, self.softcap, self.valid_vocab
        )

    @property
    def num_tokens(self) -> int:
        """Number of vocabulary entries that can be predicted."""
        return self.weight.shape[0] if self.valid_vocab is None else self.valid_vocab

    def operands(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Hidden states (N, D), weight and bias as the GEMM takes them, under autocast too."""
        weight, bias = self.weight, self.bias
        if self.valid_vocab is not None and self.valid_vocab < weight.shape[0]:
            weight = weight[: self.valid_vocab]
            bias = None if bias is None else bias[: self.valid_vocab]
        hidden = hidden.reshape(-1, hidden.shape[-1])
        device_type = hidden.device.type
        if torch.is_autocast_enabled(device_type) and hidden.dtype != torch.float64:
            dtype = torch.get_autocast_dtype(device_type)
            hidden, weight = hidden.to(dtype), weight.to(dtype)
            bias = None if bias is None else bias.to(dtype)
        return hidden, weight, bias

    def shaping(self, temperature: float) -> "Shaping":
        """What becomes of the product, the temperature included."""
        cap = None if self.softcap is None else self.softcap / temperature
        return Shaping(self.logit_scale / temperature, cap)


@specs.setting
class Shaping(NamedTuple):
    """``z = cap * tanh(factor * x / cap)`` of the product x; ``cap`` None leaves ``factor * x``."""

    factor: float
    cap: float | None


def as_head(head: "Tensor | LMHead") -> LMHead:
    """The head a caller means by a weight alone."""
    return head if isinstance(head, LMHead) else LMHead(head)


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of logits, statistics and accumulators: fp32, or float64 for float64 operands."""
    return torch.float64 if dtype == torch.float64 else torch.float32


class Projection:
    """One side's hidden states and head inside the chunk loop.

    16-bit operands meet in the GPU's own mixed GEMM; elsewhere they are widened first, a head that
    both sides share once.
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
        """Hidden states of a chunk, or of chosen tokens: (C, D)."""
        return self.hidden[rows].to(self.dtype)

    def entry_logits(self, rows: slice, ids: Tensor, dot_products: DotProducts) -> Tensor:
        """The chunk's logits (C, K) of entries, -inf behind this side's vocabulary."""
        known = ids.clamp(max=self.vocab - 1)
        logits = dot_products(self.chunk(rows), self.weight, known)
        if self.bias is not None:
            logits += self.bias[known]
        return self._shape_(logits).masked_fill_(ids >= self.vocab, -torch.inf)

    def logits(self, rows: slice, out: Tensor) -> Tensor:
        """Write the chunk's logits into ``out`` (C, >= V)."""
        matmul(self.chunk(rows), self.weight.t(), out[:, : self.vocab])
        return self.finish_(out)

    def finish_(self, out: Tensor) -> Tensor:
        """Products (C, >= V) become logits; what lies behind them becomes -inf."""
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
    """The dtype in which the GEMMs take their operands, and gradients of logits are kept."""
    return hidden.dtype if hidden.is_cuda else accumulation_dtype(hidden.dtype)


def matmul(a: Tensor, b: Tensor, out: Tensor) -> None:
    """``out = a @ b`` with the products summed, and kept, in the dtype of ``out``."""
    if a.dtype == out.dtype:
        torch.mm(a, b, out=out)
    else:
        torch.mm(a, b, out_dtype=out.dtype, out=out)


def matmul_add_(a: Tensor, b: Tensor, out: Tensor) -> None:
    """``out += a @ b`` with the products summed, and kept, in the dtype of ``out``."""
    if a.dtype == out.dtype:
        out.addmm_(a, b)
    else:
        torch.addmm(out, a, b, out_dtype=out.dtype, out=out)
