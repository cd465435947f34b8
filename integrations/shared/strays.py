"""Parameters that a model's logits may depend on, beside its layers and its head's weight.

Logits that are rebuilt once say nothing of a parameter that starts as the identity: a learned scale
of 1, or an adapter of 0.  Giving such parameters other values for a moment shows whether rebuilt
logits follow them.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from fused_sd.checks import fail
from fused_sd.integrations.shared.output_head import head_module, layers_inside


def stray_tensors(model: PreTrainedModel) -> dict[str, Tensor]:
    """Return the floating point parameters and buffers that may act on the logits, by name.

    These are all but those of language models and towers without a head of their own, which end
    before the head, and the weights that every head has.
    """
    head = head_module(model)
    layers = layers_inside(head)
    linear: Any = layers[0] if layers else head
    parts = set(head.modules())
    known = {id(getattr(linear, "weight", None)), id(getattr(linear, "bias", None))}
    # adapters that accelerate offloads, and which have the values that they were compared with
    known |= {id(t) for part in layers for t in _tensors(part).values() if t.device.type == "meta"}
    # PEFT's modules_to_save keeps copies of the head that do not run now
    copies: Any = model.get_output_embeddings()
    live = set(map(id, _tensors(head).values()))
    known |= set(map(id, _tensors(copies).values())) - live
    for part in model.modules():
        is_model = isinstance(part, PreTrainedModel) or part is model.base_model
        if is_model and parts.isdisjoint(part.modules()):
            known.update(id(tensor) for tensor in _tensors(part).values())
    return {name: tensor for name, tensor in _tensors(model).items() if id(tensor) not in known}


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    found = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    return {name: tensor for name, tensor in found.items() if tensor.is_floating_point()}


@contextmanager
def disturbed(tensors: Mapping[str, Tensor]) -> Iterator[None]:
    """Give tensors other values, and their own back afterwards.

    Raises:
        ValueError: a tensor is offloaded.
    """
    kept = []
    try:
        with torch.no_grad():
            for name, tensor in tensors.items():
                if tensor.device.type == "meta":
                    fail(
                        name, "be in memory for a check", "an offloaded one", "keep it on a device"
                    )
                for values in _held(tensor):
                    kept.append((values, values.clone()))
                    count = torch.arange(values.numel(), device=values.device)
                    # neither constant nor small: from 5 % to 15 % of the largest value, or of 1
                    pattern = (0.1 + 0.05 * torch.cos(count)).view(values.shape)
                    largest = values.abs().max() if values.numel() else 0.0
                    values.add_((pattern * (largest + 0.1)).to(values.dtype))
        yield
    finally:
        with torch.no_grad():
            for values, own in kept:
                values.copy_(own)


def _held(tensor: Any) -> list[Tensor]:
    """Return what this process holds of a tensor: of DTensors and of ZeRO-3's, its shard."""
    if hasattr(tensor, "_local_tensor"):
        return [tensor._local_tensor]
    # ZeRO-3 keeps small parameters whole, beside their shards
    shard = [tensor.ds_tensor] if hasattr(tensor, "ds_tensor") else []
    return [*shard, tensor.data] if tensor.numel() else shard
