"""A transformers model's output head: where its weight is, and what the model does to its product.

Read anew for each call, since PEFT contexts choose the live weight and wrappers replace parameters.

Dimension key:  N tokens, D hidden size, V vocabulary, R rank of an adapter
"""

from collections.abc import Callable
from dataclasses import dataclass
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from fused_sd import LMHead
from fused_sd.checks import fail

Compute = Callable[[Tensor, LMHead], Any]  # runs on hidden states and head, inside a forward

# what the installed models multiply their logits by; granite's relatives divide
MULTIPLIERS = ("logit_scale", "output_multiplier", "lm_head_multiplier")
SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")


@dataclass(frozen=True, eq=False)
class LowRank:
    """One LoRA adapter's update ``scaling * down @ up`` of the head."""

    down: Tensor  # (R, D)
    up: Tensor  # (V, R)
    scaling: float


@dataclass(frozen=True, eq=False)
class Projection:
    """The head as it is at this moment.

    Attributes:
        module: whose call runs the hooks that gather the weight.
        weight: (V, D); bias: (V,) or None.
        low_rank: adapters that are active.
        logit_scale, softcap: what becomes of the product.
    """

    module: nn.Module
    weight: Tensor
    bias: Tensor | None
    low_rank: tuple[LowRank, ...]
    logit_scale: float
    softcap: float | None

    def operands(self, hidden: Tensor) -> tuple[Tensor, LMHead]:
        """Hidden states and head whose product are the logits.

        An adapter becomes further columns, ``[h, s (h A^T)] [W, B]^T``, so that its gradients go to
        A and B; that copies the weight once.
        """
        weight, bias = self.weight, self.bias
        if self.low_rank:
            states, columns = [hidden], [weight]
            for adapter in self.low_rank:
                down = adapter.down
                states.append(nn.functional.linear(hidden.to(down.dtype), down) * adapter.scaling)
                columns.append(adapter.up)
            # PEFT keeps adapters of a 16-bit model in fp32; their update is not rounded here either
            dtype = _common_dtype(states + columns)
            hidden = torch.cat([part.to(dtype) for part in states], -1)
            weight = torch.cat([part.to(dtype) for part in columns], -1)
            bias = None if bias is None else bias.to(dtype)
        return hidden, LMHead(weight, bias, self.logit_scale, self.softcap)


def output_head(model: PreTrainedModel) -> Projection:
    """Find a model's head.

    Raises:
        ValueError: there is none, it is quantised, or adapted in a way not reproduced here.
    """
    module: Any = model.get_output_embeddings()
    if module is None:
        fail(
            "model", "have output embeddings", type(model).__name__, "pass a causal language model"
        )
    module = _saved_copy(module)
    low_rank: tuple[LowRank, ...] = ()
    linear: Any = module
    if hasattr(module, "base_layer"):
        low_rank = _low_rank(module)
        linear = module.base_layer
    weight: Any = getattr(linear, "weight", None)
    plain = type(weight) in (Tensor, nn.Parameter) and weight.is_floating_point()
    if not plain and type(weight).__name__ != "DTensor":
        got = type(weight).__name__ if weight is None else f"{type(weight).__name__} {weight.dtype}"
        fail("lm_head.weight", "be a floating point parameter", got, "keep lm_head unquantised")
    scale, softcap = _shaping(model.config.get_text_config())
    return Projection(module, weight, getattr(linear, "bias", None), low_rank, scale, softcap)


def _saved_copy(module: Any) -> Any:
    """The live copy of a head that PEFT trains whole (``modules_to_save``)."""
    if not hasattr(module, "original_module"):
        return module
    if not hasattr(module, "modules_to_save"):
        _refuse_adapter(type(module).__name__, "train lm_head by LoRA or modules_to_save")
    if module.disable_adapters or not module.active_adapters:
        return module.original_module
    return module.modules_to_save[module.active_adapters[0]]


def _low_rank(module: Any) -> tuple[LowRank, ...]:
    """The active LoRA adapters of a head."""
    if not hasattr(module, "lora_A") or not hasattr(module.base_layer, "weight"):
        _refuse_adapter(type(module).__name__, "train lm_head by LoRA or modules_to_save")
    if module.merged:
        if module.disable_adapters:
            _refuse_adapter("a merged one that is disabled", "unmerge the adapter first")
        return ()  # the update is in the weight
    if module.disable_adapters:
        return ()
    adapters = []
    for name in module.active_adapters:
        if name not in module.lora_A:
            continue
        if name in getattr(module, "lora_variant", {}) or getattr(module, "use_dora", {}).get(name):
            _refuse_adapter(f"a LoRA variant ({name})", "use plain LoRA on lm_head")
        if getattr(module.lora_dropout[name], "p", 0) > 0:
            _refuse_adapter(f"LoRA with dropout ({name})", "pass lora_dropout=0")
        down, up = module.lora_A[name], module.lora_B[name]
        if up.bias is not None:
            _refuse_adapter(f"LoRA with a bias ({name})", "pass lora_bias=False")
        adapters.append(LowRank(down.weight, up.weight, module.scaling[name]))
    return tuple(adapters)


def _refuse_adapter(got: str, remedy: str) -> None:
    fail("lm_head's adapter", "be plain LoRA without dropout, or a saved module", got, remedy)


def _shaping(config: Any) -> tuple[float, float | None]:
    """The factor and the soft-cap that a model applies, in that order, to its head's product."""
    scale = 1.0
    for name in MULTIPLIERS:
        scale *= _number(config, name) or 1.0
    divisor = _number(config, "logits_scaling") or 1.0
    scale = scale * divisor if config.model_type.startswith("hyperclovax") else scale / divisor
    caps = [cap for cap in (_number(config, name) for name in SOFTCAPS) if cap is not None]
    return scale, caps[0] if caps else None


def _number(config: Any, name: str) -> float | None:
    """A setting, None where the model has none; never 0."""
    value = getattr(config, name, None)
    if value is None:
        return None
    if not isinstance(value, Real) or value == 0:
        fail(f"config.{name}", "be a number other than 0", repr(value), "use the stock loss")
    return float(value)


def _common_dtype(tensors: list[Tensor]) -> torch.dtype:
    dtype = tensors[0].dtype
    for tensor in tensors[1:]:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype
