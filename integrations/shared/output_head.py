"""A transformers model's output head: its weight, and what the model does to the head's product.

``output_head`` is called for each request and its result is not kept: PEFT's contexts
(``disable_adapter``, ``set_adapter``) choose which weight is live, and FSDP2 and ZeRO-3 replace the
parameters while the head's module runs.  (Read in transformers 5.24 and PEFT 0.21; the attributes
of PEFT's layers that are read here are public.)

Dimension key:  N tokens, D hidden size, V vocabulary, R rank of an adapter
"""

from collections.abc import Callable
from dataclasses import dataclass
from numbers import Real
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from fused_sd import LMHead
from fused_sd.checks import fail
from fused_sd.integrations.shared.head_call import patched_forward

# runs on hidden states and head, inside the model's forward
Compute = Callable[[Tensor, LMHead], Any]

# Config settings by which models multiply their logits, by family: cohere; muse_glimmer; falcon_h1.
# granite's ``logits_scaling`` divides.
MULTIPLIERS = ("logit_scale", "output_multiplier", "lm_head_multiplier", "logits_scaling")
# Gemma and most others; recurrent_gemma; xlstm.
SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")


class Findings(NamedTuple):
    """What a config does not say of a model's logits, found by comparing them.

    Attributes:
        ignored: names of settings that the model's forward leaves out, although the config has
            them: AyaVision does not apply the ``logit_scale`` of its Cohere text model.
        num_tokens: the number of logits of a token, if the head has more rows; None: all rows.
    """

    ignored: frozenset[str] = frozenset()
    num_tokens: int | None = None


PLAIN = Findings(frozenset(MULTIPLIERS + SOFTCAPS))


@dataclass(frozen=True, eq=False)
class LowRank:
    """One LoRA adapter of the head, which adds ``scaling * up @ down`` to the weight."""

    down: Tensor  # (R, D)
    up: Tensor  # (V, R)
    scaling: float


@dataclass(frozen=True, eq=False)
class Projection:
    """The head's live parameters and the shaping of its product.

    Attributes:
        weight: (V, D).
        bias: (V,) or None.
        low_rank: the active adapters.
        logit_scale, softcap: are applied to the product, in that order.
        num_tokens: the number of rows that are tokens; None: all.
    """

    weight: Tensor
    bias: Tensor | None
    low_rank: tuple[LowRank, ...]
    logit_scale: float
    softcap: float | None
    num_tokens: int | None

    def operands(self, hidden: Tensor) -> tuple[Tensor, LMHead]:
        """Return hidden states and head whose product is the model's logits.

        Adapters become further columns, ``[h, s (h A^T)] [W, B]^T``.  The losses then need not know
        of LoRA, and autograd takes the gradients to A and B.  Concatenating copies the weight once.
        """
        weight, bias = self.weight, self.bias
        if self.low_rank:
            states, columns = [hidden], [weight]
            for adapter in self.low_rank:
                down = adapter.down
                states.append(nn.functional.linear(hidden.to(down.dtype), down) * adapter.scaling)
                columns.append(adapter.up)
            # PEFT keeps the adapters of a 16-bit model in fp32.  Rounding them to 16 bits here
            # would lose small updates that the model's own forward keeps.
            dtype = _common_dtype(states + columns)
            hidden = torch.cat([part.to(dtype) for part in states], -1)
            weight = torch.cat([part.to(dtype) for part in columns], -1)
            bias = None if bias is None else bias.to(dtype)
        elif not torch.is_autocast_enabled(hidden.device.type):
            # a head may be kept in fp32 on a 16-bit backbone, as TRL's cast_lm_head_to_fp32 does
            hidden = hidden.to(torch.promote_types(hidden.dtype, weight.dtype))
        return hidden, LMHead(weight, bias, self.logit_scale, self.softcap, self.num_tokens)


def head_module(model: PreTrainedModel) -> nn.Module:
    """Return the module that a model calls for its logits: a linear layer, or PEFT's around one.

    Raises:
        ValueError: there is none.
    """
    # Not ``model.lm_head``: some families give the head another name (embed_out, head).
    module: Any = model.get_output_embeddings()
    if module is None:
        fail(
            "model", "have output embeddings", type(model).__name__, "pass a causal language model"
        )
    if isinstance(module, nn.Embedding):
        fail("output embeddings", "be a linear layer", "an Embedding", "use stock losses")
    for wrapper in ("_fsdp_wrapped_module", "_orig_mod"):  # FSDP1, torch.compile
        module = getattr(module, wrapper, module)
    return _live_copy(module)


def layers_inside(module: nn.Module) -> list[nn.Module]:
    """Return the modules whose weights a head's forward reads, other than ``module`` itself."""
    if not hasattr(module, "base_layer"):
        return []
    parts: Any = module
    matrices = [
        layers[name]
        for layers in (getattr(parts, "lora_A", {}), getattr(parts, "lora_B", {}))
        for name in parts.active_adapters
        if name in layers
    ]
    return [parts.base_layer, *matrices]


def head_key(module: nn.Module) -> tuple[Any, ...]:
    """Return what a head's forward depends on beside its parameters.

    Logits that were compared have to be compared again where this changes: another layer, another
    adapter, or a forward that somebody has set on the module.
    """
    return tuple(
        (type(part), patched_forward(part), getattr(part, "out_features", None))
        for part in module.modules()
    )


def output_head(model: PreTrainedModel, module: nn.Module, findings: Findings) -> Projection:
    """Read a model's head, inside of the module's forward: its weight is whole only there.

    Raises:
        ValueError: it is quantised or adapted in a way that cannot be reproduced.
    """
    low_rank: tuple[LowRank, ...] = ()
    linear: Any = module
    if hasattr(module, "base_layer"):  # a PEFT tuner layer around the head
        low_rank = _active_adapters(module)
        linear = module.base_layer
    weight = plain_weight(linear)
    matrices = [weight, *(matrix for adapter in low_rank for matrix in (adapter.down, adapter.up))]
    if any(matrix.device.type == "meta" for matrix in matrices):
        remedy = "load the model without offloading, or make its adapters before it is offloaded"
        fail("lm_head's weights", "be in memory while the head runs", "one without values", remedy)
    scale, softcap = shaping(model, findings.ignored)
    bias = getattr(linear, "bias", None)
    return Projection(weight, bias, low_rank, scale, softcap, findings.num_tokens)


def plain_weight(module: nn.Module) -> Tensor:
    """Return the weight of a linear layer, or of the one inside PEFT's layer.

    Raises:
        ValueError: it is quantised.
    """
    weight: Any = getattr(getattr(module, "base_layer", module), "weight", None)
    # Quantised weights are subclasses or integers.  A DTensor is a shard outside of the module's
    # forward; one that is a shard even inside is refused by LMHead, which says what to do.
    plain = type(weight) in (Tensor, nn.Parameter) and weight.is_floating_point()
    if not plain and type(weight).__name__ != "DTensor":
        got = type(weight).__name__ if weight is None else f"{type(weight).__name__} {weight.dtype}"
        fail("lm_head.weight", "be a floating point parameter", got, "keep lm_head unquantised")
    found: Tensor = weight
    return found


def _live_copy(module: Any) -> Any:
    """Return the copy of the head that runs now, for a head in PEFT's ``modules_to_save``.

    PEFT's wrapper holds the original module and one trained copy for each adapter.  The wrapper's
    ``weight`` would be the live one too, but a request replaces the forward of the module that owns
    the weight, because that module's hooks gather it.
    """
    if not hasattr(module, "original_module"):
        return module
    if not hasattr(module, "modules_to_save"):  # another wrapper, such as trainable tokens
        _refuse_adapter(type(module).__name__, "train lm_head by LoRA or modules_to_save")
    if module.disable_adapters or not module.active_adapters:
        return module.original_module
    return module.modules_to_save[module.active_adapters[0]]


def _active_adapters(module: Any) -> tuple[LowRank, ...]:
    """Return the LoRA adapters that a head's forward would apply now.

    LoRA's forward also has variants, dropout and biases, which two matrices do not reproduce: a
    head that uses one of them is refused, since its loss would be silently wrong.
    """
    if not hasattr(module, "lora_A") or not hasattr(module.base_layer, "weight"):
        _refuse_adapter(type(module).__name__, "train lm_head by LoRA or modules_to_save")
    if module.merged:
        # PEFT's forward unmerges the weight when a merged adapter is disabled; reading it does not.
        if module.disable_adapters:
            _refuse_adapter("a merged one that is disabled", "unmerge the adapter first")
        return ()  # the weight holds the update already
    if module.disable_adapters:
        return ()
    adapters = []
    for name in module.active_adapters:
        if name not in module.lora_A:
            continue
        # older PEFT has no ``lora_variant`` and marks DoRA in ``use_dora``
        if name in getattr(module, "lora_variant", {}) or getattr(module, "use_dora", {}).get(name):
            _refuse_adapter(f"a LoRA variant ({name})", "use plain LoRA on lm_head")
        if getattr(module.lora_dropout[name], "p", 0) > 0:
            _refuse_adapter(f"LoRA with dropout ({name})", "pass lora_dropout=0")
        down, up = module.lora_A[name], module.lora_B[name]
        if not isinstance(up, nn.Module):  # AdaLoRA keeps bare parameters
            _refuse_adapter(f"{type(module).__name__} ({name})", "use plain LoRA on lm_head")
        if up.bias is not None:
            _refuse_adapter(f"LoRA with a bias ({name})", "pass lora_bias=False")
        adapters.append(LowRank(down.weight, up.weight, module.scaling[name]))
    return tuple(adapters)


def _refuse_adapter(got: str, remedy: str) -> None:
    fail("lm_head's adapter", "be plain LoRA without dropout, or a saved module", got, remedy)


def shaping(model: PreTrainedModel, ignored: frozenset[str]) -> tuple[float, float | None]:
    """Return the factor and the soft-cap that a model applies to its head's product, in that order.

    Args:
        ignored: names of settings that the model's forward leaves out.
    """
    # A multimodal model keeps the settings of its language model in a nested config.
    config: Any = model.config.get_text_config()
    scale = 1.0
    for name in MULTIPLIERS:
        if name in ignored:
            continue
        factor = _number(config, name) or 1.0
        # hyperclovax multiplies by the setting by which granite divides
        divides = name == "logits_scaling" and not config.model_type.startswith("hyperclovax")
        scale = scale / factor if divides else scale * factor
    caps = [_number(config, name) for name in SOFTCAPS if name not in ignored]
    return scale, next((cap for cap in caps if cap is not None), None)


def shaping_settings(model: PreTrainedModel) -> tuple[str, ...]:
    """Return the names of the settings that a config has and that would change logits."""
    everything = shaping(model, PLAIN.ignored)
    names = MULTIPLIERS + SOFTCAPS
    return tuple(n for n in names if shaping(model, PLAIN.ignored - {n}) != everything)


def _number(config: Any, name: str) -> float | None:
    """Return a setting, or None where the model has none; 0 is refused."""
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
