"""The head of a transformers model for a loss that is called outside of the model's forward.

``LMHead.of`` loads this module by its name, because the library itself imports no transformers.
A loss inside the forward (``attach``) is given the states that enter the head.  Outside of it a
caller has the backbone's ``last_hidden_state``, which some models change before their head, so that
one more comparison is needed than for a request.

Dimension key:  B sequences, L positions, D hidden size, V vocabulary
"""

import functools
import weakref
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fused_sd.checks.extras import require

require("trl", "transformers")

from transformers import PreTrainedModel

from fused_sd import LMHead
from fused_sd.checks import fail
from fused_sd.integrations.shared.head_call import call_in_place_of_head
from fused_sd.integrations.shared.output_head import (
    Findings,
    head_key,
    head_module,
    output_head,
)
from fused_sd.integrations.shared.probing import evaluating, probe_ids
from fused_sd.integrations.shared.self_check import FLOOR, NUM_TOKENS, is_whole
from fused_sd.integrations.shared.strays import disturbed, stray_tensors
from fused_sd.integrations.transformers import ATTACHMENT, attach, detach, is_attached, unwrap


class Compared(NamedTuple):
    """What comparisons of a model's own logits and states have shown."""

    findings: Findings
    factor: float  # the states that enter the head are the backbone's times this


# by model and ``head_key``, so that a head that is read before every step is compared once
_compared: weakref.WeakKeyDictionary[PreTrainedModel, dict[tuple[Any, ...], Compared]]
_compared = weakref.WeakKeyDictionary()


def model_head(model: nn.Module) -> LMHead:
    """Return the head that makes a model's logits of its backbone's ``last_hidden_state``.

    Raises:
        ValueError: parameters are sharded or offloaded, or the logits are not a linear head's,
            scaled and soft-capped.
    """
    inner = unwrap(model)
    if not is_whole(inner):
        fail(
            "model",
            "have whole parameters, for a head outside of its forward",
            "sharded or offloaded ones",
            "call the loss inside the forward: fused_sd.integrations.transformers.attach(model)",
        )
    module, known = head_module(inner), _compared.setdefault(inner, {})
    key = head_key(module)
    if key not in known:
        known[key] = _compare(inner)
    findings, factor = known[key]
    found = output_head(inner, module, findings)
    weight, bias = found.weight, found.bias
    for adapter in found.low_rank:
        # promotes a 16-bit weight to the adapters' fp32, whose small updates rounding would lose
        weight = weight + adapter.scaling * (adapter.up @ adapter.down)
    if bias is not None:  # it is added before the factor is applied
        bias = (bias if factor == 1 else bias / factor).to(weight.dtype)
    return LMHead(weight, bias, found.logit_scale * factor, found.softcap, found.num_tokens)


def _compare(model: PreTrainedModel) -> Compared:
    """Compare logits and states that are rebuilt with the model's own."""
    has_attachment = is_attached(model)
    attach(model)
    try:
        findings = model.__dict__[ATTACHMENT].findings[head_key(head_module(model))]
        ids = probe_ids(model, 1, NUM_TOKENS)
        with torch.no_grad(), evaluating(model):
            factor = _factor(model, ids)
            strays = stray_tensors(model)
            if strays:  # a learned factor may be 1 now
                with disturbed(strays):
                    other = _factor(model, ids)
                if abs(other - factor) > FLOOR * abs(factor):
                    _refuse(model, f"with other values of {', '.join(strays)}")
    finally:
        if not has_attachment:
            detach(model)
    return Compared(findings, factor)


def _factor(model: PreTrainedModel, ids: Tensor) -> float:
    """Return the number by which a model multiplies its backbone's states before the head."""
    run = functools.partial(model, input_ids=ids, use_cache=False)
    entering: Tensor = call_in_place_of_head(head_module(model), lambda states: states, run)
    states = _backbone(model)(input_ids=ids, use_cache=False)[0]
    if states.shape != entering.shape:
        _refuse(model, f"of shape {tuple(entering.shape)} where it gives {tuple(states.shape)}")
    wide, exact = states.double(), entering.double()
    factor = float((wide * exact).sum() / wide.square().sum())
    bound = max(FLOOR, 4 * torch.finfo(entering.dtype).eps)
    rest = float((exact - factor * wide).abs().max() / exact.abs().max())
    if not rest <= bound:  # also where it is NaN
        _refuse(model, f"that differ from its own times {factor:.3g} by {rest:.1e}")
    return 1.0 if abs(factor - 1) <= FLOOR else factor


def _backbone(model: PreTrainedModel) -> Any:
    """Return the part of a model that makes its last hidden states."""
    backbone: Any = model.base_model
    if backbone is model:  # the base_model_prefix of Llama4ForCausalLM and others names no part
        backbone = getattr(model, "model", None)
    if backbone is None:
        _refuse(model, "that no part of it makes")
    return backbone


def _refuse(model: PreTrainedModel, got: str) -> None:
    fail(
        f"{type(model).__name__}'s head",
        "be called with its backbone's last_hidden_state, or a multiple of it",
        f"states {got}",
        "call the loss inside the forward, which has the states that enter the head: "
        "fused_sd.integrations.transformers.attach(model)",
    )
