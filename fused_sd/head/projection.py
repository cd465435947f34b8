"""From hidden states to a chunk of logits and back: the only GEMMs of the library.

Logits leave the GEMM in fp32 whatever the operands' dtype (float64 operands stay in float64), and
every gradient is accumulated in that same dtype: rounding happens once, where a gradient is handed
back to autograd.

Dimension key:  N tokens, C tokens in a chunk, D hidden size, V vocabulary
"""

import dataclasses
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from fused_sd import checks
from fused_sd.checks import tensors as tensor_checks
from fused_sd.head.vocab_shard import check_even_shards
from fused_sd.settings import setting

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
        shard_sizes: where the vocabulary lies on the ranks of a process group and ``weight`` and
            ``bias`` are this rank's rows: the number of rows of each rank, in rank order.  None:
            all ranks have as many.  ``valid_vocab`` counts over all ranks.

    Raises:
        ValueError: when a shape, a dtype or a number is out of range.
    """

    weight: Tensor
    bias: Tensor | None = None
    logit_scale: float = 1.0
    softcap: float | None = None
    valid_vocab: int | None = None
    shard_sizes: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        tensor_checks.check_head(self.weight, self.bias)
        tensor_checks.check_shaping(self.num_rows, self.logit_scale, self.softcap, self.valid_vocab)

    @property
    def num_rows(self) -> int:
        """Rows of the whole head, padding included."""
        return self.weight.shape[0] if self.shard_sizes is None else sum(self.shard_sizes)

    @property
    def num_tokens(self) -> int:
        """Number of vocabulary entries that can be predicted."""
        return self.num_rows if self.valid_vocab is None else self.valid_vocab

    def token_counts(self) -> list[int]:
        """Vocabulary entries of each rank; of one where the head is whole."""
        sizes = self.shard_sizes or self.weight.shape[:1]
        starts = [0, *itertools.accumulate(sizes)]
        return [max(0, min(size, self.num_tokens - start)) for size, start in zip(sizes, starts)]

    def operands(self, hidden: Tensor, rank: int = 0) -> tuple[Tensor, Tensor, Tensor | None]:
        """Hidden states (N, D), weight and bias as the GEMM takes them, under autocast too."""
        weight, bias = self.weight, self.bias
        num_valid = self.token_counts()[rank]
        if num_valid < weight.shape[0]:
            weight = weight[:num_valid]
            bias = None if bias is None else bias[:num_valid]
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


@setting
class Shaping(NamedTuple):
    """``z = cap * tanh(factor * x / cap)`` of the product x; ``cap`` None leaves ``factor * x``."""

    factor: float
    cap: float | None


def as_head(head: "Tensor | LMHead") -> LMHead:
    """The head a caller means by a weight alone."""
    return head if isinstance(head, LMHead) else LMHead(head)


def placed_head(head: "Tensor | LMHead", process_group: "dist.ProcessGroup | None") -> LMHead:
    """The head a caller means, with the ranks' shards where the vocabulary lies on a group."""
    head = as_head(head)
    if process_group is None:
        if head.shard_sizes is not None:
            checks.fail(
                "process_group",
                "come with a head that has shard_sizes",
                "None",
                "pass the ranks' group, or a whole head without shard_sizes",
            )
        return head
    if not isinstance(process_group, dist.ProcessGroup):
        checks.fail(
            "process_group",
            "be a torch.distributed.ProcessGroup that this rank belongs to, or None",
            repr(process_group),
            "pass the tensor-parallel group, such as mesh.get_group('tp')",
        )
    rows, rank, num_ranks = head.weight.shape[0], process_group.rank(), process_group.size()
    if head.shard_sizes is None:
        check_even_shards(head.weight, process_group)
        return dataclasses.replace(head, shard_sizes=(rows,) * num_ranks)
    if len(head.shard_sizes) != num_ranks or head.shard_sizes[rank] != rows:
        checks.fail(
            "shard_sizes",
            f"list the rows of {num_ranks} ranks, of which rank {rank} has {rows}",
            head.shard_sizes,
            "pass the number of rows that each rank of process_group holds, in rank order",
        )
    return head


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

    def entry_logits(self, rows: slice, columns: Tensor, dot_products: DotProducts) -> Tensor:
        """The chunk's logits (C, K) of columns, -inf behind this side's vocabulary."""
        if self.vocab == 0:  # a rank that has padding alone
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
