"""How a model answers a request: which arguments it takes, and what ``compute`` is given.

Dimension key:  B sequences, L positions, D hidden size
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from fused_sd import LMHead
from fused_sd.checks import fail
from fused_sd.integrations.shared.head_call import call_in_place_of_head, call_inside
from fused_sd.integrations.shared.output_head import (
    Findings,
    head_module,
    layers_inside,
    output_head,
)
from fused_sd.integrations.shared.request import Request

ABOUT_LOGITS = (
    "labels",
    "shift_labels",
    "num_items_in_batch",
    "logits_to_keep",
    "num_logits_to_keep",
)
ABOUT_OUTPUTS = ("output_hidden_states", "output_attentions", "output_router_logits")
CACHES = ("past_key_values", "cache", "cache_params")


def answer(
    model: PreTrainedModel,
    request: Request,
    findings: Findings,
    forward: Callable[..., Any],
    inputs: Mapping[str, Any],
) -> Any:
    """Run the model's own forward up to its head, and the request in the place of the head.

    Args:
        forward: the forward of ``model``, which takes ``inputs`` by keyword.
    """
    check_returns(model.config)
    module = head_module(model)

    def compute(states: Tensor) -> Any:
        if states.dim() != 3:
            fail("hidden states", "be (B, L, D)", tuple(states.shape), "use stock losses")
        hidden = request.select(states)

        def inside(layers: list[nn.Module]) -> Any:
            if layers:
                return call_inside(layers[0], lambda: inside(layers[1:]), states)
            projection = output_head(model, module, findings)
            return request.compute(*_on_device(*projection.operands(hidden), _input_device(model)))

        return inside(layers_inside(module))

    return call_in_place_of_head(module, compute, lambda: forward(**inputs))


def check_returns(config: Any) -> None:
    """Refuse a config whose models return tuples: most of them cannot read their own layers'."""
    if not getattr(config, "return_dict", True):
        fail("config.return_dict", "be True", False, "set model.config.return_dict = True")


def checked_arguments(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of a call with a request, as the model's own forward takes them.

    Raises:
        ValueError: an argument asks for something that a request does not return.
    """
    given = {name: value for name, value in kwargs.items() if value is not None}
    for name in ABOUT_LOGITS:
        # PeftModelForCausalLM.forward passes labels=None
        if name in given:
            fail(
                name,
                "be left out of a call with fused_sd, which makes no logits",
                type(given[name]).__name__,
                "select positions with Request(compute, positions)",
            )
    wanted = [name for name in ABOUT_OUTPUTS if not _is_off(given.get(name))]
    if not given.get("return_dict", True):
        wanted.append("return_dict")
    if given.get("use_cache") and not any(name in given for name in CACHES):
        wanted.append("use_cache")
    if wanted:
        fail(
            wanted[0],
            "be left out of a call with fused_sd, which returns what compute returned, and no more",
            repr(given[wanted[0]]),
            "return it from compute, or call the model without fused_sd",
        )
    # Otherwise the model's config decides, which mostly asks for a cache that nobody reads.
    return {**kwargs, "use_cache": given.get("use_cache", False)}


def _is_off(flag: Any) -> bool:
    return flag is None or flag is False


def _input_device(model: PreTrainedModel) -> torch.device | None:
    """Return where accelerate has found the inputs of a model that it spreads over devices.

    The model's own logits come back to that device, where the tensors of a loss lie as well.
    """
    hook: Any = getattr(model, "_hf_hook", None)
    for part in getattr(hook, "hooks", [hook]):
        if getattr(part, "io_same_device", False):
            device: torch.device | None = part.input_device
            return device
    return None


def _on_device(hidden: Tensor, head: LMHead, device: torch.device | None) -> tuple[Tensor, LMHead]:
    """Move states and head together; they stay where they are for None."""
    if device is None or device == hidden.device == head.weight.device:
        return hidden, head
    bias = None if head.bias is None else head.bias.to(device)
    head = dataclasses.replace(head, weight=head.weight.to(device), bias=bias)
    return hidden.to(device), head
