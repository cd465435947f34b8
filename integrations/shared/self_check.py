"""Whether logits rebuilt from hidden states and head are those that a model makes itself."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from fused_sd import LMHead
from fused_sd.checks import fail
from fused_sd.integrations.shared.output_head import Compute

NUM_TOKENS = 8
LARGE_LOGIT = 60.0  # bends at every soft-cap in use
FLOOR = 1e-5  # of the largest logit: order of additions in fp32


def is_whole(model: nn.Module) -> bool:
    """Whether every parameter is here and not sharded, so that the bare model can run."""
    return all(
        type(parameter).__name__ != "DTensor"
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
    """Compare a few tokens' logits, as they are and with hidden states enlarged.

    Small logits would hide a soft-cap, so the states that enter the head are multiplied as well, by
    a hook on its module.

    Args:
        request: the answer of a ``compute`` for token ids (1, L).
        original: the model's own logits of them.

    Raises:
        ValueError: a logit differs by more than rounding.
    """
    embeddings: Any = model.get_input_embeddings().weight
    module = model.get_output_embeddings()
    vocab_size = model.config.get_text_config().vocab_size
    # spread over the vocabulary by a prime
    ids = (7919 * torch.arange(1, NUM_TOKENS + 1, device=embeddings.device))[None] % vocab_size
    training = [part for part in model.modules() if part.training]
    model.eval()
    try:
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
        if calls:
            largest = max(largest, _difference(rebuilt.enlarged, own_enlarged))
    finally:
        for part in training:
            part.training = True
    bound = max(FLOOR, 4 * torch.finfo(own.dtype).eps, 4 * rebuilt.precision)
    if not largest <= bound:
        fail(
            f"logits rebuilt from lm_head ({rebuilt.shaping})",
            f"be those of {type(model).__name__} within {bound:.1e} of the largest",
            f"a difference of {largest:.1e}",
            "this model does something else to its logits: use its own losses, or call fused_sd "
            "with an LMHead that reproduces it",
        )


class _Rebuilt(NamedTuple):
    logits: Tensor  # (1, L, V)
    enlarged: Tensor  # (1, L, V), from hidden states multiplied by
    factor: float
    precision: float  # of the product
    shaping: str


def _rebuild(hidden: Tensor, head: LMHead) -> _Rebuilt:
    """Logits and enlarged logits, inside the head's module, where its weight is whole."""
    product = _product(hidden, head)
    factor = LARGE_LOGIT / max(float(product.abs().max()), 1e-6)
    precision = torch.finfo(nn.functional.linear(hidden[:, :1], head.weight[:1]).dtype).eps
    shaping = f"scale {head.logit_scale:g}, soft-cap {head.softcap}"
    enlarged = _soft_capped(_product(hidden * factor, head), head)
    return _Rebuilt(_soft_capped(product, head), enlarged, factor, precision, shaping)


def _soft_capped(logits: Tensor, head: LMHead) -> Tensor:
    if head.softcap is None:
        return logits
    return head.softcap * torch.tanh(logits / head.softcap)


def _product(hidden: Tensor, head: LMHead) -> Tensor:
    return nn.functional.linear(hidden, head.weight, head.bias).float() * head.logit_scale


def _difference(rebuilt: Tensor, own: Tensor) -> float:
    """The largest difference, of the largest logit."""
    own = own[..., : rebuilt.shape[-1]].float()
    if own.shape != rebuilt.shape:
        return float("inf")
    return float((rebuilt - own).abs().max() / own.abs().max().clamp(min=1e-30))
