"""Whether logits rebuilt from hidden states and head are those that a model makes itself."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from fused_sd import LMHead
from fused_sd.checks import fail

NUM_TOKENS = 8
LARGE_LOGIT = 60.0  # bends at every soft-cap in use
FLOOR = 1e-5  # of the largest logit: order of additions in fp32


def is_whole(model: nn.Module) -> bool:
    """Whether every parameter is here and not sharded, so that the bare model can run."""
    return all(
        type(parameter).__name__ != "DTensor"
        and not hasattr(parameter, "ds_id")
        and parameter.device.type != "meta"
        for parameter in model.parameters()
    )


def check_rebuilt_logits(
    model: PreTrainedModel,
    rebuild: Callable[[Tensor], tuple[Tensor, LMHead]],
    original: Callable[[Tensor], Tensor],
) -> None:
    """Compare a few tokens' logits, as they are and with hidden states enlarged.

    Small logits would hide a soft-cap, so the states that enter the head are multiplied as well, by
    a hook on its module.

    Args:
        rebuild: hidden states and head of token ids (1, L).
        original: the model's logits of them.

    Raises:
        ValueError: a logit differs by more than rounding.
    """
    embeddings, module = model.get_input_embeddings().weight, model.get_output_embeddings()
    config = model.config.get_text_config()
    # spread over the vocabulary by a prime
    ids = (7919 * torch.arange(1, NUM_TOKENS + 1, device=embeddings.device)) % config.vocab_size
    training = [part for part in model.modules() if part.training]
    model.eval()
    try:
        hidden, head = rebuild(ids[None])
        factor = LARGE_LOGIT / max(float(_product(hidden, head).abs().max()), 1e-6)
        largest = _difference(logits_of(hidden, head), original(ids[None]))
        calls = []

        def enlarge(_: nn.Module, states: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            calls.append(True)
            return (states[0] * factor, *states[1:])

        handle = module.register_forward_pre_hook(enlarge)
        try:
            enlarged = original(ids[None])
        finally:
            handle.remove()
        if calls:
            largest = max(largest, _difference(logits_of(hidden * factor, head), enlarged))
    finally:
        for part in training:
            part.training = True
    bound = max(FLOOR, 4 * torch.finfo(enlarged.dtype).eps, 4 * torch.finfo(hidden.dtype).eps)
    if not largest <= bound:
        fail(
            f"logits rebuilt from lm_head (scale {head.logit_scale:g}, soft-cap {head.softcap})",
            f"be those of {type(model).__name__} within {bound:.1e} of the largest",
            f"{largest:.1e}",
            "this model does something else to its logits: use its own losses, or call fused_sd "
            "with an LMHead that reproduces it",
        )


def logits_of(hidden: Tensor, head: LMHead) -> Tensor:
    """The head's logits, in the plain way."""
    logits = _product(hidden, head)
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
