"""The output projection as a caller describes it: ``LMHead``, accepted wherever a weight is."""

import dataclasses
import importlib
import itertools
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from fused_sd import checks
from fused_sd.checks import tensors as tensor_checks
from fused_sd.head.vocab_shard import check_even_shards
from fused_sd.settings import setting


@dataclass(frozen=True, eq=False)
class LMHead:
    """An output projection, with what some models do to its logits.

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
        shard_sizes: where ranks of a process group share the vocabulary, so that ``weight`` and
            ``bias`` are this rank's rows: the number of rows of each rank, in rank order.  None:
            all ranks hold equally many.  ``valid_vocab`` counts over all ranks.

    Raises:
        ValueError: when a shape, a dtype or a number is out of range.

    Examples:
        >>> import torch, fused_sd
        >>> hidden, weight, token_ids = torch.randn(3, 16), torch.randn(104, 16), torch.arange(3)
        >>> head = fused_sd.LMHead(weight, softcap=30.0, valid_vocab=100)  # and 4 rows of padding
        >>> found = fused_sd.token_log_probs(hidden, head, token_ids)
        >>> logits = 30 * torch.tanh(hidden @ weight[:100].T / 30)
        >>> torch.allclose(found.log_probs, logits.log_softmax(-1)[range(3), token_ids], atol=1e-4)
        True
    """

    weight: Tensor
    bias: Tensor | None = None
    logit_scale: float = 1.0
    softcap: float | None = None
    valid_vocab: int | None = None
    shard_sizes: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        tensor_checks.check_head(self.weight, self.bias)
        tensor_checks.check_shards(self.shard_sizes)
        tensor_checks.check_shaping(self.num_rows, self.logit_scale, self.softcap, self.valid_vocab)

    @classmethod
    def of(cls, model: Any) -> "LMHead":
        """Return the head of a transformers causal language model, for its ``last_hidden_state``.

        Scale, soft-cap, bias and rows without a logit are the model's.  The first call for a model
        compares logits of a few tokens, made with the head, with the model's own.  The head holds
        the model's parameters, so that it may be kept while they are trained.  Where PEFT has put
        LoRA on the head, its weight is a new (V, D) tensor, which each step has to make anew; a
        16-bit head with fp32 adapters becomes fp32, and wants its states in fp32.

        Args:
            model: a PreTrainedModel, or one inside PEFT, DDP or torch.compile.

        Raises:
            ValueError: the model does something else to its logits or to the states before its
                head, the head is quantised, or parameters are sharded or offloaded.
        """
        # by name, because nothing below the integrations imports transformers
        integration = importlib.import_module("fused_sd.integrations.shared.model_head")
        head: LMHead = integration.model_head(model)
        return head

    @property
    def num_rows(self) -> int:
        """Rows of the whole head, padding included."""
        return self.weight.shape[0] if self.shard_sizes is None else sum(self.shard_sizes)

    @property
    def num_tokens(self) -> int:
        """Number of vocabulary entries that can be predicted."""
        return self.num_rows if self.valid_vocab is None else self.valid_vocab

    def token_counts(self) -> list[int]:
        """How many vocabulary entries each rank holds; one number where the head is whole."""
        sizes = self.shard_sizes or self.weight.shape[:1]
        starts = [0, *itertools.accumulate(sizes)]
        return [max(0, min(size, self.num_tokens - start)) for size, start in zip(sizes, starts)]

    def operands(
        self, hidden: Tensor, rank: int = 0, other: "tuple[LMHead, Tensor] | None" = None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return states (N, D), weight and bias as the GEMM takes them.

        Padding rows are left out, and the dtype is autocast's where it is on.

        Args:
            other: a head and its weight as the GEMM takes it, which is used again where this head's
                weight is the same memory.
        """
        weight, bias = self.weight, self.bias
        num_valid = self.token_counts()[rank]
        if num_valid < weight.shape[0]:
            weight = weight[:num_valid]
            bias = None if bias is None else bias[:num_valid]
        hidden = hidden.reshape(-1, hidden.shape[-1])
        device_type = hidden.device.type
        if torch.is_autocast_enabled(device_type) and hidden.dtype != torch.float64:
            dtype = torch.get_autocast_dtype(device_type)
            hidden = hidden.to(dtype)
            head, cast = other or (None, weight)
            is_shared = head is not None and is_same(head.weight, self.weight)
            weight = cast if is_shared and len(cast) == num_valid else weight.to(dtype)
            bias = None if bias is None else bias.to(dtype)
        return hidden, weight, bias

    def shaping(self, temperature: float) -> "Shaping":
        """How products of states and weight become logits, the temperature included."""
        cap = None if self.softcap is None else self.softcap / temperature
        return Shaping(self.logit_scale / temperature, cap)


Head = Tensor | LMHead  # a weight alone is a head without bias, scale or soft-cap


@setting
class Shaping(NamedTuple):
    """``z = cap * tanh(factor * x / cap)`` of the product x; ``cap`` None leaves ``factor * x``."""

    factor: float
    cap: float | None


def is_same(one: Tensor | None, other: Tensor | None) -> bool:
    """Whether two tensors are the same elements of the same memory, or both absent."""
    if one is None or other is None or torch.compiler.is_compiling():  # no addresses are traced
        return one is other
    return (
        one.data_ptr() == other.data_ptr()
        and one.dtype == other.dtype
        and one.shape == other.shape
        and one.stride() == other.stride()
    )


def as_head(head: "Tensor | LMHead", argument: str) -> LMHead:
    """The head that a caller means by a weight alone, in the argument that is named."""
    if isinstance(head, LMHead):
        return head
    tensor_checks.check_head(head, argument=argument)
    return LMHead(head)


def placed_head(
    head: "Tensor | LMHead", argument: str, process_group: "dist.ProcessGroup | None"
) -> LMHead:
    """The head that a caller means, with the ranks' shard sizes where a group shares it.

    Args:
        head: what the caller gave.
        argument: how the caller calls it.
        process_group: ranks that share the vocabulary; None: the head is whole.

    Raises:
        ValueError: when the head and the group do not fit each other.
    """
    head = as_head(head, argument)
    if process_group is None:
        if head.shard_sizes is not None:
            checks.fail(
                "process_group",
                "come with a head that has shard_sizes",
                "None",
                "pass the ranks' group, or a whole head without shard_sizes",
            )
        return head
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
