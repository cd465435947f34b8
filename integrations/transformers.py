"""Losses inside the forward of a transformers causal language model.

``attach(model)`` replaces the model's forward.  ``model(**inputs, fused_sd=Request(compute))`` then
runs the original forward up to the head, calls ``compute`` with the hidden states and the head, and
returns what ``compute`` returned.  Without ``fused_sd`` the original forward runs as it is, so
generation is untouched.

    attach(model)
    score = Request(lambda h, head: token_log_probs(h, head, ids), completion_positions(T))
    model(input_ids=input_ids, attention_mask=mask, fused_sd=score).result.log_probs

``compute`` runs inside the wrapped model's forward, and there inside the forward of the head's own
module.  Wrappers that shard parameters force both:

* FSDP2 and ZeRO-3 gather the head's weight in a pre-forward hook and free it afterwards.  A weight
  that is captured in the forward and used after it has no storage any more, or only a shard.
* Their hooks that gather the weight again for backward hang on the tensors that the wrapped forward
  returns.  DDP finds the parameters that a loss used from the same tensors.
* A head that is an FSDP2 unit of its own is whole only while its own module runs.  So is one that
  accelerate offloads to the CPU or to disk.

(Read in torch 2.13, accelerate 1.15 and transformers 5.24.)

Dimension key:  B sequences, L positions, D hidden size, V vocabulary
"""

import copy
import dataclasses
import functools
import inspect
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from fused_sd.checks.extras import require

require("trl", "transformers")

from transformers import PreTrainedModel

from fused_sd.checks import fail
from fused_sd.integrations.shared.answering import answer, check_returns, checked_arguments
from fused_sd.integrations.shared.head_call import check_hooks, forward_slot
from fused_sd.integrations.shared.output_head import (
    Compute,
    Findings,
    head_key,
    head_module,
    plain_weight,
)
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
    """The state that ``attach`` keeps on a model.

    Examples:
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> config = GPT2Config(vocab_size=64, n_embd=16, n_layer=1, n_head=2)
        >>> model = GPT2LMHeadModel(config).eval()
        >>> from fused_sd.integrations.transformers import Attachment, attach
        >>> any(isinstance(value, Attachment) for value in vars(attach(model)).values())
        True
    """

    original: Callable[..., Any] | None  # a forward set on the instance; None: the class's own
    installed: Callable[..., Any]  # the function that answers requests
    autocast: Autocast
    # by ``head_key``: of heads whose rebuilt logits were compared with the model's own
    findings: dict[tuple[Any, ...], Findings] = field(default_factory=dict)
    # names of the attention implementations that were seen to keep packed sequences apart
    packs_with: set[str] = field(default_factory=set)

    def forward(self, model: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
        """Run the model's forward as it was before ``attach``."""
        if self.original is None:
            return type(model).forward(model, *args, **kwargs)
        return self.original(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Attachment":
        # The autocast is shared: it may be a method of an Accelerator, which holds its models.
        original, packs_with = copy.deepcopy(self.original, memo), set(self.packs_with)
        return dataclasses.replace(
            self, original=original, findings=dict(self.findings), packs_with=packs_with
        )

    def __reduce__(self) -> tuple[Any, ...]:
        # A model that pickle or torch.load brings back has its class's forward: pickle stores a
        # bound method by its name.  Without an attachment, attach can be called on it again.
        return _no_attachment, ()


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

    Examples:
        >>> import torch, fused_sd
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> config = GPT2Config(vocab_size=64, n_embd=16, n_layer=1, n_head=2)
        >>> model = GPT2LMHeadModel(config).eval()
        >>> from fused_sd.integrations.transformers import Request, attach, completion_positions
        >>> ids = torch.randint(64, (2, 7))  # the last 3 of each row are the response
        >>> def score(hidden, head):
        ...     return fused_sd.token_log_probs(hidden, head, ids[:, -3:])
        >>> found = attach(model)(ids, fused_sd=Request(score, completion_positions(3))).result
        >>> found.log_probs.shape
        torch.Size([2, 3])
    """
    inner = unwrap(model)
    if autocast is not None and not callable(autocast):
        rule, remedy = "be a function that makes a context", "pass accelerator.autocast"
        fail("autocast", rule, repr(autocast), remedy)
    if is_attached(model):
        return model
    if isinstance(model, nn.DataParallel) and len(model.device_ids) > 1:
        fail(
            "model",
            "run on one device, or be wrapped in DistributedDataParallel",
            f"DataParallel over {model.device_ids}",
            "start one process for each device, with torchrun or accelerate launch",
        )
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
    # accelerate's hooks on the model stay around the forward that answers
    slot = forward_slot(inner)
    original = inner.__dict__.get(slot)
    installed = _answering(type(inner).forward)
    state = Attachment(original, installed, nullcontext if autocast is None else autocast)
    check_returns(inner.config)
    check_hooks(head_module(inner))
    plain_weight(head_module(inner))
    if is_whole(inner):
        _check_once(inner, state)
    setattr(inner, ATTACHMENT, state)
    # A bound method, because accelerate wraps ``forward.__func__`` and binds the result again.
    setattr(inner, slot, MethodType(installed, inner))
    return model


def detach(model: nn.Module) -> nn.Module:
    """Undo ``attach``.

    Raises:
        ValueError: something else has wrapped the forward since.

    Examples:
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> config = GPT2Config(vocab_size=64, n_embd=16, n_layer=1, n_head=2)
        >>> model = GPT2LMHeadModel(config).eval()
        >>> from fused_sd.integrations.transformers import attach, detach, is_attached
        >>> is_attached(detach(attach(model)))
        False
    """
    inner = unwrap(model)
    state = inner.__dict__.get(ATTACHMENT)
    if state is None:
        return model
    slot = forward_slot(inner)
    if getattr(inner.__dict__.get(slot), "__func__", None) is not state.installed:
        fail(
            "model",
            "have the forward that attach gave it",
            "one wrapped since then",
            "undo the other wrapper first, for accelerate by unwrap_model(keep_fp32_wrapper=False)",
        )
    delattr(inner, ATTACHMENT)
    if state.original is not None:
        setattr(inner, slot, state.original)
    elif slot == "forward":
        del inner.forward
    else:  # accelerate's hook calls what is there
        setattr(inner, slot, MethodType(type(inner).forward, inner))
    return model


def is_attached(model: nn.Module) -> bool:
    """Return whether a model answers requests.

    Examples:
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> config = GPT2Config(vocab_size=64, n_embd=16, n_layer=1, n_head=2)
        >>> model = GPT2LMHeadModel(config).eval()
        >>> from fused_sd.integrations.transformers import attach, is_attached
        >>> is_attached(model), is_attached(attach(model))
        (False, True)
    """
    return unwrap(model).__dict__.get(ATTACHMENT) is not None


def unwrap(model: nn.Module) -> PreTrainedModel:
    """Return the PreTrainedModel inside DDP, FSDP, torch.compile, DeepSpeed's engine and PEFT.

    Examples:
        >>> import torch
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> config = GPT2Config(vocab_size=64, n_embd=16, n_layer=1, n_head=2)
        >>> model = GPT2LMHeadModel(config).eval()
        >>> from fused_sd.integrations.transformers import unwrap
        >>> unwrap(torch.compile(model)) is model
        True
    """
    inner: Any = model
    while not isinstance(inner, PreTrainedModel):
        # PeftModel.base_model is the tuner (LoraModel); PEFT's own method goes through it
        if hasattr(inner, "get_base_model"):
            inner = inner.get_base_model()
            continue
        wrapped = [getattr(inner, name) for name in ("module", "_orig_mod") if hasattr(inner, name)]
        if not wrapped or not isinstance(inner, nn.Module):
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
        if not isinstance(fused_sd, Request):
            remedy = "pass Request(compute, positions)"
            fail("fused_sd", "be a Request or None", repr(fused_sd), remedy)
        inputs = checked_arguments(_by_name(forward, self, args, kwargs))
        run = functools.partial(state.forward, self)
        with state.autocast():
            findings = _check_once(self, state)
            return FusedOutput(result=answer(self, fused_sd, findings, run, inputs))

    return answering


def _by_name(
    forward: Callable[..., Any],
    model: PreTrainedModel,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> dict[str, Any]:
    """Return a call's arguments by the names that a forward gives them."""
    bound = inspect.signature(forward).bind_partial(model, *args).arguments
    names = list(bound)[1:]
    for name in names:
        if name in kwargs:
            raise TypeError(f"forward() got multiple values for argument {name!r}")
    return {**{name: bound[name] for name in names}, **kwargs}


def _check_once(model: PreTrainedModel, state: Attachment) -> Findings:
    """Compare logits rebuilt in a request with the model's own, the first time for each head."""
    key = head_key(head_module(model))
    if key in state.findings:
        return state.findings[key]
    forward = functools.partial(state.forward, model, use_cache=False)

    def request(compute: Compute, ids: Tensor, findings: Findings) -> Any:
        return answer(model, Request(compute), findings, forward, {"input_ids": ids})

    def original(ids: Tensor) -> Tensor:
        try:
            logits: Tensor = forward(input_ids=ids).logits
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            # such as a model that needs images, or one that its release of transformers has broken
            got = f"{type(error).__name__}: {error}"
            raise ValueError(
                f"{type(model).__name__} must run on token ids alone, so that its logits can be "
                f"compared, got {got}; use its own losses"
            ) from error
        return logits

    # The same autocast on both sides: the original forward of a model that accelerate has not
    # prepared has none of its own.
    with torch.no_grad(), state.autocast():
        state.findings[key] = check_rebuilt_logits(model, request, original)
    return state.findings[key]


def _no_attachment() -> None:
    """Stand for the attachment of a model that was pickled."""
