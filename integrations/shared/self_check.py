"""Checks that logits rebuilt from hidden states and head are those that a model makes itself.

transformers has no field that says everything a model does to its logits.  ``output_head`` reads
the settings that are known; this check catches the models that do something else.
"""

import functools
import itertools
import math
from collections.abc import Callable
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from fused_sd import LMHead
from fused_sd.checks import fail
from fused_sd.integrations.shared.output_head import (
    PLAIN,
    Compute,
    Findings,
    head_module,
    shaping,
    shaping_settings,
)
from fused_sd.integrations.shared.probing import evaluating, probe_ids, product_precision
from fused_sd.integrations.shared.strays import disturbed, stray_tensors

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
        # accelerate's hooks fetch the weights of a module that it offloads
        and (parameter.device.type != "meta" or hasattr(module, "_hf_hook"))
        for module in model.modules()
        for parameter in module.parameters(recurse=False)
    )


def check_rebuilt_logits(
    model: PreTrainedModel,
    request: Callable[[Compute, Tensor, Findings], Any],
    original: Callable[[Tensor], Tensor],
) -> Findings:
    """Compare a few tokens' logits with those that a request would make.

    They are compared for hidden states as they are and for enlarged ones: a soft-cap hardly changes
    small logits, so that a missing one would not show.  They are compared a second time with other
    values in the parameters around the head: one that starts as the identity, such as a scale of
    1, or an adapter of 0, would not show either.

    Args:
        request: returns what a ``compute`` makes of token ids (1, L).
        original: returns the model's own logits (1, L, V) of token ids (1, L).

    Returns:
        Which of the config's settings the model leaves out, and how many tokens it predicts.

    Raises:
        ValueError: a logit differs by more than rounding, or depends on other parameters.
    """
    ids = probe_ids(model, 1, NUM_TOKENS)
    scale, _ = shaping(model, frozenset())
    rebuild = functools.partial(_rebuild, scale=scale)
    with evaluating(model):
        pairs, bound = _both(model, rebuild, request, original, ids)
        findings, least = _best_findings(model, pairs)
        if not least <= bound:  # also where it is NaN
            _refuse(model, "its config", bound, least)
        strays = stray_tensors(model)
        if strays:
            with disturbed(strays):
                pairs, bound = _both(model, rebuild, request, original, ids)
                largest = _largest_difference(model, pairs, findings)
            if not largest <= bound:
                _refuse(model, f"values of {', '.join(strays)} other than now", bound, largest)
    return findings


def _refuse(model: PreTrainedModel, given: str, bound: float, largest: float) -> NoReturn:
    scale, softcap = shaping(model, frozenset())
    fail(
        f"logits rebuilt from lm_head (scale {scale:g}, soft-cap {softcap}), with {given},",
        f"be those of {type(model).__name__} within {bound:.1e} of the largest",
        f"a difference of {largest:.1e}",
        "this model does something else to its logits: use its own losses, or call fused_sd "
        "with an LMHead that reproduces it",
    )


Pair = tuple[Tensor, Tensor]  # products of the head (1, L, V), the model's own logits (1, L, V')


def _both(
    model: PreTrainedModel,
    rebuild: Callable[[Tensor, LMHead], "_Products"],
    request: Callable[[Compute, Tensor, Findings], Any],
    original: Callable[[Tensor], Tensor],
    ids: Tensor,
) -> tuple[list[Pair], float]:
    """Return products and own logits, of states as they are and enlarged, and the allowed error."""
    own = original(ids)  # first: a model that does not run on ids alone says so here
    products = request(rebuild, ids, PLAIN)

    def enlarge(_: nn.Module, states: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (states[0] * products.factor, *states[1:])

    handle = head_module(model).register_forward_pre_hook(enlarge)
    try:
        own_enlarged = original(ids)
    finally:
        handle.remove()
    bound = max(FLOOR, 4 * torch.finfo(own.dtype).eps, 4 * products.precision)
    return [(products.small, own), (products.large, own_enlarged)], bound


def _best_findings(model: PreTrainedModel, pairs: list[Pair]) -> tuple[Findings, float]:
    """Return the findings that explain the model's logits best, the config's settings first."""
    names = shaping_settings(model)
    num_rows, num_logits = pairs[0][0].shape[-1], pairs[0][1].shape[-1]
    num_tokens = num_logits if num_logits < num_rows else None
    best, least = Findings(), math.inf
    for count in range(len(names) + 1):
        for left_out in itertools.combinations(names, count):
            findings = Findings(frozenset(left_out), num_tokens)
            largest = _largest_difference(model, pairs, findings)
            # a setting that changes less than rounding does is applied
            if count == 0 or largest < 0.1 * least:
                best, least = findings, largest
    return best, least


def _largest_difference(model: PreTrainedModel, pairs: list[Pair], findings: Findings) -> float:
    scale, softcap = shaping(model, findings.ignored)
    largest = 0.0
    for product, own in pairs:
        logits = product[..., : findings.num_tokens] * scale
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        difference = _difference(logits, own)
        largest = difference if math.isnan(difference) else max(largest, difference)
    return largest


class _Products(NamedTuple):
    """Products of the head with a few tokens' states."""

    small: Tensor  # (1, L, V) fp32, of the states as they are
    large: Tensor  # (1, L, V) fp32, of states times ``factor``
    factor: float
    precision: float  # machine epsilon of the product's dtype


def _rebuild(hidden: Tensor, head: LMHead, *, scale: float) -> _Products:
    """Make both kinds of products; runs inside the head's module, where its weight is whole."""
    small = _product(hidden, head)
    # a power of two rounds nothing, in whichever dtype the model multiplies its states
    largest = max(float(small.abs().max()) * abs(scale), 1e-6)
    factor = 2.0 ** round(math.log2(LARGE_LOGIT / largest))
    precision = product_precision(hidden, head)
    return _Products(small, _product(hidden * factor, head), factor, precision)


def _product(hidden: Tensor, head: LMHead) -> Tensor:
    return nn.functional.linear(hidden, head.weight, head.bias).float()


def _difference(rebuilt: Tensor, own: Tensor) -> float:
    """Return the largest difference, relative to the largest logit."""
    own = own.float()
    if own.shape != rebuilt.shape:
        return math.inf
    return float((rebuilt - own).abs().max() / own.abs().max().clamp(min=1e-30))
