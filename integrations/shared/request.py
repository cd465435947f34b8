"""Requests: what a model's forward computes instead of logits, and what it returns.

Dimension key:  B sequences, L positions, N positions that are selected, D hidden size
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.utils import ModelOutput

from fused_sd import LMHead
from fused_sd.integrations.shared.output_head import Compute


@dataclass(frozen=True, eq=False)
class Request:
    """What a forward computes instead of logits.

    Args:
        compute: is called with the selected hidden states and the head, and returns a tensor, or
            tensors in tuples, named tuples or dicts.  Wrappers do not look into other containers.
        positions: selects hidden states.  A slice of the sequence selects (B, length, D); a (B, L)
            bool mask selects (N, D); an integer tensor of any shape holds places among the B * L
            positions and selects (*shape, D); a pair of integer tensors holds rows and columns,
            and selects (*shape, D); None selects all, (B, L, D).

    Examples:
        >>> import torch
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> config = GPT2Config(vocab_size=64, n_embd=16, n_layer=1, n_head=2)
        >>> model = GPT2LMHeadModel(config).eval()
        >>> from fused_sd.integrations.transformers import Request, attach, hidden_states
        >>> ids = torch.randint(64, (2, 3))
        >>> mask = torch.tensor([[0, 1, 1], [1, 1, 0]]).bool()
        >>> attach(model)(ids, fused_sd=Request(hidden_states, mask)).result.shape
        torch.Size([4, 16])
    """

    # A closure hides the tensors that it uses from FSDP and DDP, which cast, move or scatter the
    # tensors that they find in a forward's arguments.
    compute: Compute
    positions: slice | Tensor | tuple[Tensor, Tensor] | None = None

    def select(self, hidden: Tensor) -> Tensor:
        if self.positions is None:
            return hidden
        if isinstance(self.positions, slice):
            return hidden[:, self.positions]
        # a model that is spread over devices has its head on another one than its inputs
        if isinstance(self.positions, tuple):
            return hidden[tuple(index.to(hidden.device) for index in self.positions)]
        positions = self.positions.to(hidden.device)
        if positions.dtype == torch.bool:
            return hidden[positions]
        return hidden.flatten(0, 1)[positions]


@dataclass
class FusedOutput(ModelOutput):
    """Holds what ``compute`` returned.

    transformers registers every ModelOutput as a pytree node, so that wrappers find its tensors.

    Examples:
        >>> from fused_sd.integrations.transformers import FusedOutput
        >>> FusedOutput(result=(1.0, 2.0)).result  # as compute returned it
        (1.0, 2.0)
    """

    result: Any = None

    def __post_init__(self) -> None:
        # ModelOutput's own __post_init__ would spread a mapping over the fields.  Wrappers rebuild
        # an output from the mapping of its fields, which is undone here.
        if isinstance(self.result, Mapping) and list(self.result) == ["result"]:
            self.result = self.result["result"]
        if self.result is not None:
            self["result"] = self.result


def hidden_states(hidden: Tensor, head: LMHead) -> Tensor:
    """Return the states that enter the head; a ``compute`` for ``Request``.

    Examples:
        >>> import torch
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> config = GPT2Config(vocab_size=64, n_embd=16, n_layer=1, n_head=2)
        >>> model = GPT2LMHeadModel(config).eval()
        >>> from fused_sd.integrations.transformers import Request, attach, hidden_states
        >>> ids = torch.randint(64, (2, 5))
        >>> states = attach(model)(ids, fused_sd=Request(hidden_states)).result
        >>> torch.allclose(states @ model.lm_head.weight.T, model(ids).logits, atol=1e-5)
        True
    """
    return hidden


def completion_positions(length: int) -> slice:
    """Return the positions whose states predict the last ``length`` tokens.

    Examples:
        >>> import torch
        >>> from fused_sd.integrations.transformers import completion_positions
        >>> ids = torch.tensor([[5, 6, 7, 8, 9]])
        >>> ids[:, completion_positions(2)]  # whose states predict the last two, 8 and 9
        tensor([[7, 8]])
    """
    return slice(-length - 1, -1)
