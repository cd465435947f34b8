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
from fused_sd.checks import check_positive_int, fail
from fused_sd.checks.tensors import INTEGER, is_readable
from fused_sd.integrations.shared.output_head import Compute

POSITIONS = "be a slice, a bool mask (B, L), a tensor of places, a pair of rows and columns or None"


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

    def __post_init__(self) -> None:
        if not callable(self.compute):
            rule, remedy = "be a function of hidden states and head", "pass hidden_states, or yours"
            fail("compute", rule, repr(self.compute), remedy)
        places = self.positions
        if places is None or isinstance(places, slice):
            return
        pair = places if isinstance(places, tuple) else (places,)
        is_pair = len(pair) == 2 or not isinstance(places, tuple)
        if not is_pair or not all(isinstance(part, Tensor) for part in pair):
            fail("positions", POSITIONS, repr(places), "see Request")
        for part in pair:
            is_mask = part.dtype == torch.bool and not isinstance(places, tuple)
            if not is_mask and part.dtype not in INTEGER:
                fail("positions", POSITIONS, part.dtype, "pass a bool mask or int64 places")

    def select(self, hidden: Tensor) -> Tensor:
        self._check_fit(hidden.shape[:2])
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

    def _check_fit(self, shape: torch.Size) -> None:
        """Refuse a mask of another shape, and on the CPU places outside of the batch (B, L)."""
        if self.positions is None or isinstance(self.positions, slice):
            return
        rows, length = shape[0], shape[1]
        if isinstance(self.positions, tuple):
            bounds = [(self.positions[0], rows), (self.positions[1], length)]
        elif self.positions.dtype == torch.bool:
            if self.positions.shape != shape:
                rule, got = f"be a mask of {tuple(shape)}", tuple(self.positions.shape)
                fail("positions", rule, got, "mark each position of the inputs")
            return
        else:
            bounds = [(self.positions, rows * length)]
        for places, limit in bounds:
            if is_readable(places) and bool(((places < -limit) | (places >= limit)).any()):
                rule, largest = f"be places below {limit}", int(places.abs().max())
                fail("positions", rule, largest, "select places of the inputs")


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
    check_positive_int("length", length)
    return slice(-length - 1, -1)
