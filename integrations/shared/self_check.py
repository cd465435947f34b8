"""Checks that logits rebuilt from hidden states and head are those that a model makes itself.

transformers has no field that says everything a model does to its logits.  ``output_head`` reads
the settings that are known; this check catches the models that do something else.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from fused_sd import LMHead
from fused_sd.checks import fail
from fused_sd.integrations.shared.output_head import Compute
from fused_sd.integrations.shared.probing import evaluating, probe_ids, product_precision

NUM_TOKENS = 8
LARGE_LOGIT = 60.0  # large enough that every soft-cap in use changes it
FLOOR = 1e-5  # allowed difference, relative to the largest logit: the order of additions in fp32


def is_whole(model: nn.Module) -> bool:
    """Return whether no parameter is sharded or absent, so that the bare model can run.

    Wrappers are recognised by what they leave on parameters, so that neither DeepSpeed nor FSDP has
    to be imported.
    """
    return all(
        type(parameter).__name__ != "DTensor"  # FSDP2, tensor parallelism
        and not hasattr(parameter, "ds_id")  # ZeRO-3
        and not hasattr(parameter, "_fsdp_flattened")  # FSDP1
        and parameter.device.type != "meta"
        for parameter in model.parameters()
    )


def check_rebuilt_logits(
    model: PreTrainedModel,
    request: Callable[[Compute, Tensor], Any],
    original: Callable[[Tensor], Tensor],
) -> None:
    """Compare a few tokens' logits, with hidden states as they are and with enlarged ones.

    A soft-cap hardly changes small logits, so that a missing one would not show.  A hook on the
    head's module therefore multiplies the states in a second forward.

    Args:
        request: returns what a ``compute`` makes of token ids (1, L).
        original: returns the model's own logits (1, L, V) of token ids (1, L).

    Raises:
        ValueError: a logit differs by more than rounding.
    """
    module: Any = model.get_output_embeddings()
    ids = probe_ids(model, 1, NUM_TOKENS)
    with evaluating(model):
        rebuilt = request(_rebuild, ids)
        calls = []

        def enlarge(_: nn.Module, states: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            calls.append(True)
            return (states[0] * rebuilt.factor, *states[1:])

        own = original(ids)
        largest = _difference(rebuilt.logits, own)
        handle = module.register_forward_pre_hook(enlarge)
        try:
            own_enlarged = original(ids)
        finally:
            handle.remove()
        # A model that multiplies by the weight without calling the module runs no hook.
        if calls:
            largest = max(largest, _difference(rebuilt.enlarged, own_enlarged))
    bound = max(FLOOR, 4 * torch.finfo(own.dtype).eps, 4 * rebuilt.precision)
    if not largest <= bound:  # also where it is NaN
        fail(
            f"logits rebuilt from lm_head ({rebuilt.shaping})",
            f"be those of {type(model).__name__} within {bound:.1e} of the largest",
            f"a difference of {largest:.1e}",
            "this model does something else to its logits: use its own losses, or call fused_sd "
            "with an LMHead that reproduces it",
        )


class _Rebuilt(NamedTuple):
    """Logits of a few tokens, made from hidden states and head."""

    logits: Tensor  # (1, L, V)
    enlarged: Tensor  # (1, L, V), from hidden states times ``factor``
    factor: float
    precision: float  # machine epsilon of the product's dtype
    shaping: str  # what was done to the product, in words


def _rebuild(hidden: Tensor, head: LMHead) -> _Rebuilt:
    """Make both kinds of logits; runs inside the head's module, where its weight is whole."""
    product = _product(hidden, head)
    # a power of two rounds nothing, in whichever dtype the model multiplies its states
    factor = 2.0 ** round(math.log2(LARGE_LOGIT / max(float(product.abs().max()), 1e-6)))
    shaping = f"scale {head.logit_scale:g}, soft-cap {head.softcap}"
    enlarged = _soft_capped(_product(hidden * factor, head), head)
    precision = product_precision(hidden, head)
    return _Rebuilt(_soft_capped(product, head), enlarged, factor, precision, shaping)


def _soft_capped(logits: Tensor, head: LMHead) -> Tensor:
    if head.softcap is None:
        return logits
    return head.softcap * torch.tanh(logits / head.softcap)


def _product(hidden: Tensor, head: LMHead) -> Tensor:
    return nn.functional.linear(hidden, head.weight, head.bias).float() * head.logit_scale


def _difference(rebuilt: Tensor, own: Tensor) -> float:
    """Return the largest difference, relative to the largest logit."""
    # A model may pad its logits to more entries than the head has.
    own = own[..., : rebuilt.shape[-1]].float()
    if own.shape != rebuilt.shape:
        return float("inf")
    return float((rebuilt - own).abs().max() / own.abs().max().clamp(min=1e-30))
