"""What PEFT's layers hold for each adapter: reading it, and copying it under another name.

(What is said of PEFT was read in 0.21; it is supported from 0.13 on.)
"""

import copy
from collections.abc import Iterator
from operator import attrgetter
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn


def copy_adapter(model: PeftModel, adapter: str, name: str) -> str:
    """Give a model a copy of one of its adapters, which is neither active nor trained.

    Each layer's entries for the adapter are copied as they are.  ``PeftModel.add_adapter`` would
    make a new adapter from the configuration instead, which

    * changes the base weights again where the first one did (PiSSA, OLoRA, KaSA), and replicates
      layers again (``layer_replication``);
    * leaves out tied layers (``ensure_weight_tying``);
    * knows no scaling that was set afterwards.

    Args:
        model: holds the adapter, whole.
        adapter: the name of the adapter to copy.
        name: the copy's name; if it is taken, ``_2`` and so on is appended.

    Returns:
        The copy's name.
    """
    taken, base_name, number = model.peft_config, name, 1
    while name in taken:
        number += 1
        name = f"{base_name}_{number}"
    memo: dict[int, Any] = {}  # what the adapter ties is tied in its copy
    entries = [held for part in model.modules() for held in _by_adapter(part) if adapter in held]
    # All copies first: a copy that fails leaves the model as it was.
    copies = [None if isinstance(e, set) else copy.deepcopy(e[adapter], memo) for e in entries]
    config: Any = copy.deepcopy(model.peft_config[adapter])
    # Whoever loads the saved copy has the student's base weights, to be left alone.
    config.init_lora_weights = True
    for held, made in zip(entries, copies):
        if isinstance(held, set):
            held.add(name)
        elif name not in held:  # tied layers have one entry in common
            held[name] = made
    model.peft_config[name] = config
    for tensor in adapter_tensors(model, name).values():
        tensor.requires_grad_(False)
    return name


def adapter_tensors(model: PeftModel, adapter: str) -> dict[str, Tensor]:
    """Return the parameters and buffers of one adapter by name, each tensor once."""
    found: dict[str, Tensor] = {}
    known: set[int] = set()
    for path, container, held in _containers(model, adapter):
        tensors = {"": held}
        if isinstance(held, nn.Module):
            tensors = {**dict(held.named_parameters()), **dict(held.named_buffers())}
        for name, tensor in tensors.items():
            if id(tensor) not in known:
                known.add(id(tensor))
                found[f"{path}.{container}.{name}"] = tensor
    return found


def changes_nothing(model: PeftModel, adapter: str) -> bool:
    """Return whether the model computes the same with an adapter as without any.

    LoRA's B is zero before training (for embeddings it is A's role); a copy in ``modules_to_save``
    equals its original.  False where it is not known.
    """
    for path, container, held in _containers(model, adapter):
        layer: Any = model.get_submodule(path)
        if container in ("lora_A", "lora_embedding_B"):
            continue
        if container == "lora_B":
            same = all(not tensor.any() for tensor in held.parameters())
        elif container == "lora_embedding_A":
            same = not held.any()
        elif container == "modules_to_save":
            values = held.state_dict(), layer.original_module.state_dict()
            same = all(torch.equal(values[0][name], values[1][name]) for name in values[0])
        else:
            same = False
        if not same:
            return False
    return True


def _containers(model: PeftModel, adapter: str) -> Iterator[tuple[str, str, Any]]:
    """Yield what each layer holds of an adapter's weights.

    PEFT lists in ``adapter_layer_names`` the attributes in which a layer keeps its adapters by name
    (``lora_A``, ``modules_to_save``).  ``get_peft_model_state_dict`` would go through the whole
    model's ``state_dict``, and loading would have to undo its renaming.

    Yields:
        path: the layer's name.
        container: the attribute's name.
        held: the adapter's module, or its tensor.
    """
    for path, part in model.named_modules():
        # each once: DoRA appends the name of its magnitudes, in some releases for each adapter
        for container in dict.fromkeys(getattr(part, "adapter_layer_names", ())):
            held = attrgetter(container)(part)
            if adapter in held:
                yield path, container, held[adapter]


def _by_adapter(part: nn.Module) -> Iterator[Any]:
    """Yield a layer's dictionaries and sets by adapter: its weights, settings and names."""
    if not getattr(part, "adapter_layer_names", ()):
        return
    for name, held in [*vars(part).items(), *part._modules.items()]:
        is_own = not name.startswith("_") or name == "_adapters"  # not nn.Module's dictionaries
        if is_own and (isinstance(held, set) or hasattr(held, "keys")):
            yield held
