"""Losses inside the forward of a transformers causal language model.

``attach(model)`` replaces the model's forward.  ``model(**inputs, fused_sd=Request(compute))`` then
runs the backbone, calls ``compute`` with the hidden states and the output head, and returns what
``compute`` returned.  Without ``fused_sd`` the original forward runs, so generation is untouched.

    attach(model)
    score = Request(lambda h, head: token_log_probs(h, head, ids), completion_positions(T))
    model(input_ids=input_ids, attention_mask=mask, fused_sd=score).result.log_probs

``compute`` runs inside the wrapped model's forward, and there inside the forward of the head's own
module.  Wrappers that shard parameters force both:

* FSDP2 and ZeRO-3 gather the head's weight in a pre-forward hook and free it afterwards.  A weight
  that is captured in the forward and used after it has no storage any more, or only a shard.
* Their hooks that gather the weight again for backward hang on the tensors that the wrapped forward
  returns.  DDP finds the parameters that a loss used from the same tensors.
* A head that is an FSDP2 unit of its own is whole only while its own module runs.

(Read in torch 2.13, accelerate 1.15 and transformers 5.24.)

Dimension key:  B sequences, L positions, D hidden size, V vocabulary
"""

import functools
import inspect
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from transformers import PreTrainedModel

from fused_sd.checks import fail
from fused_sd.integrations.shared.output_head import Compute, Projection, output_head
from fused_sd.integrations.shared.request import (
    FusedOutput,
    Request,
    completion_positions,
    hidden_states,
)
from fused_sd.integrations.shared.self_check import check_rebuilt_logits, is_whole

__all__ = [
    "Attachment",
    "FusedOutput",
    "Request",
    "attach",
    "completion_positions",
    "detach",
    "hidden_states",
    "is_attached",
    "unwrap",
]

Autocast = Callable[[], AbstractContextManager[Any]]
ATTACHMENT = "_fused_sd_attachment"


@dataclass
class Attachment:
    """The state that ``attach`` keeps on a model."""

    original: Callable[..., Any] | None  # a forward set on the instance; None: the class's own
    installed: Callable[..., Any]  # the function that answers requests
    autocast: Autocast
    checked: bool = False
    # names of the attention implementations that were seen to keep packed sequences apart
    packs_with: set[str] = field(default_factory=set)

    def forward(self, model: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
        """Run the model's forward as it was before ``attach``."""
        if self.original is None:
            return type(model).forward(model, *args, **kwargs)
        return self.original(*args, **kwargs)


def attach(model: nn.Module, *, autocast: Autocast | None = None) -> nn.Module:
    """Let a causal language model answer ``fused_sd`` requests.  A second call does nothing.

    Logits of a few tokens, rebuilt from hidden states and head, are first compared with the model's
    own.  Where parameters are sharded, the bare model cannot run; then the first request compares
    them.

    Args:
        model: a PreTrainedModel, or one inside PEFT, DDP or another wrapper.
        autocast: makes the context in which requests run.  Only a model that accelerate has
            prepared needs it: accelerate puts autocast around the forward that was there before,
            and a request does not run that forward.  Pass ``accelerator.autocast``.

    Returns:
        The model it was given.

    Raises:
        ValueError: the head is missing, quantised or adapted in a way that cannot be reproduced, or
            rebuilt logits differ from the model's.
    """
    inner = unwrap(model)
    if ATTACHMENT in inner.__dict__:
        return model
    # Accelerator.prepare_model leaves this attribute where it has wrapped forward in autocast.
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
    # A bound method, because accelerate wraps ``forward.__func__`` and binds the result again.
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
    """Return whether a model answers requests."""
    return ATTACHMENT in unwrap(model).__dict__


def unwrap(model: nn.Module) -> PreTrainedModel:
    """Return the PreTrainedModel inside DDP, FSDP, torch.compile, DeepSpeed's engine and PEFT."""
    inner: Any = model
    while not isinstance(inner, PreTrainedModel):
        # PeftModel.base_model is the tuner (LoraModel); PEFT's own method goes through it
        if hasattr(inner, "get_base_model"):
            inner = inner.get_base_model()
            continue
        wrapped = [getattr(inner, name) for name in ("module", "_orig_mod") if hasattr(inner, name)]
        if not wrapped:
            fail("model", "be or hold a PreTrainedModel", type(inner).__name__, "pass the model")
        inner = wrapped[0]
    return inner


def _answering(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Return a forward that answers requests, with the name and signature of the class's own.

    generate, Trainer and TRL read from the signature which arguments a model takes.
    """

    @functools.wraps(inspect.unwrap(forward))
    def answering(
        self: PreTrainedModel, *args: Any, fused_sd: Request | None = None, **kwargs: Any
    ) -> Any:
        # Read from ``self``, not from a closure: a deep copy of the model shares this function, and
        # a teacher made by copying must run on its own weights.
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
    # PeftModelForCausalLM.forward passes labels=None, which a backbone's forward would refuse.
    kwargs = {name: value for name, value in kwargs.items() if value is not None}
    for name in ("labels", "logits_to_keep"):
        if name in kwargs:
            fail(
                name,
                "be left out of a call with fused_sd, which makes no logits",
                type(kwargs[name]).__name__,
                "select positions with Request(compute, positions)",
            )
    # Otherwise the model's config decides, which mostly asks for a cache that nobody reads.
    kwargs["use_cache"] = kwargs.get("use_cache", False)
    hidden = _backbone(model)(*args, **kwargs).last_hidden_state
    return _inside_head(model, request.compute, request.select(hidden))


def _backbone(model: PreTrainedModel) -> nn.Module:
    """Return the model without its head; looked up on each call, since wrappers replace modules."""
    # ``base_model`` also runs a vision tower where there is one; ``get_decoder()`` would skip it.
    backbone = model.base_model
    if backbone is model:
        fail(
            "model", "have a backbone apart from its head", type(model).__name__, "use stock losses"
        )
    return backbone


def _inside_head(model: PreTrainedModel, compute: Compute, hidden: Tensor) -> Any:
    """Call ``compute`` as the forward of the head's module, so that the module's hooks run.

    The hooks gather a sharded weight before the call and register its backward after it.
    """
    module = output_head(model).module

    def forward(states: Tensor) -> Any:
        # Read again: the hooks have replaced the sharded parameter by the whole weight.
        projection: Projection = output_head(model)
        return tree_map(_without_view, compute(*projection.operands(states)))

    replaced = module.__dict__.get("forward")
    module.forward = forward
    try:
        return module(hidden)
    finally:
        del module.forward
        if replaced is not None:
            module.forward = replaced


def _without_view(value: Any) -> Any:
    """Copy an output that is a view of another tensor.

    FSDP2 hooks backward's gathering to a module's output tensors.  An in-place operation on a view
    drops the hook, and backward then reads a weight that is not there.
    """
    is_view = isinstance(value, Tensor) and value.requires_grad and value._is_view()
    return value.clone() if is_view else value


def _check_once(model: PreTrainedModel, state: Attachment) -> None:
    """Compare logits rebuilt from a request with the model's own, the first time only."""
    if state.checked:
        return

    def request(compute: Compute, ids: Tensor) -> Any:
        return _answer(model, Request(compute), (), {"input_ids": ids})

    def original(ids: Tensor) -> Tensor:
        return state.forward(model, input_ids=ids, use_cache=False).logits

    # The same autocast on both sides: the original forward of a model that accelerate has not
    # prepared has none of its own.
    with torch.no_grad(), state.autocast():
        check_rebuilt_logits(model, request, original)
    state.checked = True
