"""Losses inside the forward of a transformers causal language model.

``attach(model)`` lets ``model(**inputs, fused_sd=Request(compute))`` run the backbone, hand its
hidden states and the output head to ``compute`` and return what that returns.  All of it happens
inside the wrapped forward, and ``compute`` inside the forward of the head's own module: only there
do DDP, FSDP2 and ZeRO-3 hold the head's weight whole, and only then do their hooks fire again
before backward.  Without ``fused_sd`` the original forward runs, so generation is untouched.

    attach(model)
    score = Request(lambda h, head: token_log_probs(h, head, ids), completion_positions(T))
    model(input_ids=input_ids, attention_mask=mask, fused_sd=score).result.log_probs

Dimension key:  B sequences, L positions, D hidden size, V vocabulary
"""

import functools
import inspect
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from fused_sd import LMHead
from fused_sd.checks import fail
from fused_sd.integrations.shared.output_head import Compute, Projection, output_head
from fused_sd.integrations.shared.self_check import check_rebuilt_logits, is_whole

Autocast = Callable[[], AbstractContextManager[Any]]
ATTACHMENT = "_fused_sd_attachment"


@dataclass(frozen=True, eq=False)
class Request:
    """What a forward computes instead of logits.

    Args:
        compute: called with the selected hidden states and the head; returns tensors, in tuples,
            named tuples or dicts if there are several, so that the wrappers find them.
        positions: a slice of the sequence, whose states are (B, length, D); or a (B, L) bool mask,
            whose states are (N, D); or places among the B L positions, an integer tensor of any
            shape, whose states are (*shape, D); None: all, (B, L, D).
    """

    # a function hides its tensors from wrappers, which cast those that they find in arguments
    compute: Compute
    positions: slice | Tensor | None = None

    def select(self, hidden: Tensor) -> Tensor:
        if self.positions is None:
            return hidden
        if isinstance(self.positions, slice):
            return hidden[:, self.positions]
        if self.positions.dtype == torch.bool:
            return hidden[self.positions]
        return hidden.flatten(0, 1)[self.positions]


@dataclass
class FusedOutput(ModelOutput):
    """What ``compute`` returned.  A ModelOutput, whose tensors the wrappers find."""

    result: Any = None

    def __post_init__(self) -> None:
        # ModelOutput's own would take any mapping apart; wrappers make copies from one of fields
        if isinstance(self.result, Mapping) and list(self.result) == ["result"]:
            self.result = self.result["result"]
        if self.result is not None:
            self["result"] = self.result


def hidden_states(hidden: Tensor, head: LMHead) -> Tensor:
    """A ``compute`` that returns the states that enter the head."""
    return hidden


def completion_positions(length: int) -> slice:
    """The positions that predict the last ``length`` tokens."""
    return slice(-length - 1, -1)


@dataclass
class Attachment:
    """What ``attach`` leaves on a model."""

    original: Callable[..., Any] | None  # a forward that was already wrapped; None: the class's own
    installed: Callable[..., Any]  # the function that answers requests
    autocast: Autocast
    checked: bool = False
    # attentions that were seen to keep packed sequences apart
    packs_with: set[str] = field(default_factory=set)

    def forward(self, model: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
        """The model's forward as it was before."""
        if self.original is None:
            return type(model).forward(model, *args, **kwargs)
        return self.original(*args, **kwargs)


def attach(model: nn.Module, *, autocast: Autocast | None = None) -> nn.Module:
    """Let a causal language model answer ``fused_sd`` requests.  Does nothing a second time.

    Before that it compares logits rebuilt from hidden states and head with the model's own, for a
    few tokens; where parameters are sharded, on the first request instead.

    Args:
        model: a PreTrainedModel, or one inside PEFT, DDP or another wrapper.
        autocast: makes the context in which requests run.  Needed only for a model that accelerate
            has prepared: its autocast wraps the forward that a request leaves out.  Pass
            ``accelerator.autocast``.

    Returns:
        The model it was given.

    Raises:
        ValueError: the head is missing, quantised or adapted in a way that is not reproduced here,
            or rebuilt logits are not those of the model.
    """
    inner = unwrap(model)
    if ATTACHMENT in inner.__dict__:
        return model
    if "_original_forward" in inner.__dict__ and autocast is None:
        fail(
            "autocast",
            "be given for a model that accelerate has prepared",
            "None",
            "call attach(model) before prepare(model), or pass autocast=accelerator.autocast",
        )
    if inner.config.is_encoder_decoder:
        fail("model", "be a causal language model", type(inner).__name__, "use its decoder alone")
    original = inner.__dict__.get("forward")
    installed = _answering(type(inner).forward)
    state = Attachment(original, installed, nullcontext if autocast is None else autocast)
    output_head(inner)
    if is_whole(inner):
        _check_once(inner, state)
    setattr(inner, ATTACHMENT, state)
    inner.forward = MethodType(installed, inner)
    return model


def detach(model: nn.Module) -> nn.Module:
    """Undo ``attach``.

    Raises:
        ValueError: something else has wrapped the forward since.
    """
    inner = unwrap(model)
    state = inner.__dict__.get(ATTACHMENT)
    if state is None:
        return model
    if getattr(inner.forward, "__func__", None) is not state.installed:
        fail(
            "model",
            "have the forward that attach gave it",
            "one wrapped since then",
            "undo the other wrapper first, for accelerate by unwrap_model(keep_fp32_wrapper=False)",
        )
    del inner.forward
    delattr(inner, ATTACHMENT)
    if state.original is not None:
        inner.forward = state.original
    return model


def is_attached(model: nn.Module) -> bool:
    """Whether a model answers requests."""
    return ATTACHMENT in unwrap(model).__dict__


def unwrap(model: nn.Module) -> PreTrainedModel:
    """The PreTrainedModel inside DDP, FSDP, a compiled module, DeepSpeed's engine and PEFT."""
    inner: Any = model
    while not isinstance(inner, PreTrainedModel):
        if hasattr(inner, "get_base_model"):
            inner = inner.get_base_model()
            continue
        wrapped = [getattr(inner, name) for name in ("module", "_orig_mod") if hasattr(inner, name)]
        if not wrapped:
            fail("model", "be or hold a PreTrainedModel", type(inner).__name__, "pass the model")
        inner = wrapped[0]
    return inner


def _answering(forward: Callable[..., Any]) -> Callable[..., Any]:
    """A forward that answers requests, with the name and arguments of the class's own."""

    # generate and Trainer read the names of a model's arguments from its forward
    @functools.wraps(inspect.unwrap(forward))
    def answering(
        self: PreTrainedModel, *args: Any, fused_sd: Request | None = None, **kwargs: Any
    ) -> Any:
        # the state is found on the model, so that a deep copy uses its own weights
        state: Attachment = self.__dict__[ATTACHMENT]
        if fused_sd is None:
            return state.forward(self, *args, **kwargs)
        with state.autocast():
            _check_once(self, state)
            return FusedOutput(result=_answer(self, fused_sd, args, kwargs))

    return answering


def _answer(
    model: PreTrainedModel, request: Request, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Run the backbone, then the request inside the head's module."""
    kwargs = {name: value for name, value in kwargs.items() if value is not None}
    for name in ("labels", "logits_to_keep"):
        if name in kwargs:
            fail(
                name,
                "be left out of a call with fused_sd, which makes no logits",
                type(kwargs[name]).__name__,
                "select positions with Request(compute, positions)",
            )
    kwargs["use_cache"] = kwargs.get("use_cache", False)
    hidden = _backbone(model)(*args, **kwargs).last_hidden_state
    return _inside_head(model, request.compute, request.select(hidden))


def _own_memory(value: Any) -> Any:
    """FSDP2 hangs its backward hook on outputs; an in-place operation on a view would lose it."""
    is_view = isinstance(value, Tensor) and value.requires_grad and value._is_view()
    return value.clone() if is_view else value


def _backbone(model: PreTrainedModel) -> nn.Module:
    """The model without its head; looked up on each call, since wrappers replace modules."""
    backbone = model.base_model
    if backbone is model:
        fail(
            "model", "have a backbone apart from its head", type(model).__name__, "use stock losses"
        )
    return backbone


def _inside_head(model: PreTrainedModel, compute: Compute, hidden: Tensor) -> Any:
    """Call ``compute`` as the forward of the head's module, with that module's hooks around it."""
    module = output_head(model).module

    def forward(states: Tensor) -> Any:
        # read here: the hooks that gather the weight have run
        projection: Projection = output_head(model)
        return tree_map(_own_memory, compute(*projection.operands(states)))

    replaced = module.__dict__.get("forward")
    module.forward = forward
    try:
        return module(hidden)
    finally:
        del module.forward
        if replaced is not None:
            module.forward = replaced


def _check_once(model: PreTrainedModel, state: Attachment) -> None:
    """Compare logits rebuilt from a request with the model's own, once."""
    if state.checked:
        return

    def request(compute: Compute, ids: Tensor) -> Any:
        return _answer(model, Request(compute), (), {"input_ids": ids})

    def original(ids: Tensor) -> Tensor:
        return state.forward(model, input_ids=ids, use_cache=False).logits

    with torch.no_grad(), state.autocast():
        check_rebuilt_logits(model, request, original)
    state.checked = True
