"""Checks of ``FusedSDLossConfig``: ranges, combinations, and settings that nothing reads."""

from dataclasses import fields
from typing import TYPE_CHECKING, Any

from fused_sd import checks
from fused_sd.integrations.verl import RLSD_LOSS, TOPK_LOSS
from fused_sd.terms.divergence import DIVERGENCES

if TYPE_CHECKING:
    from fused_sd.integrations.verl.config import FusedSDLossConfig

# loss_mode -> settings that this loss alone reads
_READ_BY = {
    TOPK_LOSS: (
        "divergence",
        "divergence_parameter",
        "beta",
        "forward_weight",
        "support",
        "support_mass",
        "remainder",
        "tail_floor",
        "entry_clip",
        "token_clip",
        "importance_cap",
    ),
    RLSD_LOSS: (
        "rlsd_mix",
        "rlsd_mix_warmup_steps",
        "rlsd_mix_hold_steps",
        "rlsd_mix_decay_steps",
        "rlsd_clip_low",
        "rlsd_clip_high",
        "rlsd_log_prob",
        "rlsd_dual_clip",
    ),
}
# setting -> the other setting, and the values of it, with which this one is read
_READ_WITH = {
    "support_mass": ("support", ("teacher_nucleus",)),
    "ema_rate": ("teacher", ("ema",)),
    "teacher_sync_steps": ("teacher", ("ema", "synced")),
    "trust_region_mix": ("teacher", ("reference",)),
}


def parameter_field(config: "FusedSDLossConfig", divergence: str) -> str | None:
    """Return the name of the setting that holds a divergence's parameter; None if it has none.

    It is the parameter's own name in the library, or ``divergence_parameter`` if no setting has
    that name: a divergence that the library gains needs no change here.
    """
    known = DIVERGENCES[divergence]
    if known.setting is None:
        return None
    return known.parameter_name if hasattr(config, known.parameter_name) else "divergence_parameter"


def check_unread(config: "FusedSDLossConfig") -> None:
    """Refuse a setting that nothing reads, unless it has its default value."""
    for loss, names in _READ_BY.items():
        if loss != config.loss_mode:
            _check_default(config, names, f"loss_mode={config.loss_mode!r}")
    for name, (other, values) in _READ_WITH.items():
        if getattr(config, other) not in values:
            _check_default(config, (name,), f"{other}={getattr(config, other)!r}")
    checks.check_one_of("divergence", config.divergence, DIVERGENCES)
    for divergence in DIVERGENCES:
        parameter = parameter_field(config, divergence)
        if parameter is not None and parameter != parameter_field(config, config.divergence):
            _check_default(config, (parameter,), f"divergence={config.divergence!r}")
    if config.loss_mode in _READ_BY:
        _check_default(config, ("use_chunked_topk",), "a loss that holds no logits")
        if config.loss_mode == RLSD_LOSS or config.teacher != "server":
            where = f"loss_mode={config.loss_mode!r}, teacher={config.teacher!r}"
            _check_default(config, ("log_prob_min_clamp",), where)


def _check_default(config: "FusedSDLossConfig", names: tuple[str, ...], where: str) -> None:
    """Refuse settings that differ from their defaults; ``where`` says who does not read them."""
    defaults = {field.name: field.default for field in fields(config)}
    for name in names:
        if getattr(config, name) != defaults[name]:
            checks.fail(
                name,
                f"be left as it is with {where}, which does not read it",
                repr(getattr(config, name)),
                f"leave it at {defaults[name]!r}",
            )


def check_divergence(config: "FusedSDLossConfig") -> None:
    """Check what ``fused_sd_topk`` reads beside the ``Comparison``, which checks itself."""
    if config.teacher == "server" and config.support != "teacher_topk":
        checks.fail(
            "support",
            'be "teacher_topk" with teacher="server", which sends its own top-k alone',
            repr(config.support),
            'pass teacher="live", "ema", "synced", "reference" or "worker_group" to compare others',
        )
    if config.support != "full":
        checks.check_positive_int("topk", config.topk)
    comparison = config.comparison
    for name in ("importance_cap", "loss_max_clamp"):
        if getattr(config, name) is not None:
            checks.check_positive(name, getattr(config, name), "pass null to leave it out")
    if comparison.log_prob_floor is not None and not comparison.log_prob_floor < 0:
        got = comparison.log_prob_floor
        checks.fail("log_prob_min_clamp", "be below 0", got, "verl's own default is -10")
    if comparison.token_clip is not None and config.loss_max_clamp is not None:
        both = f"{comparison.token_clip} beside loss_max_clamp={config.loss_max_clamp}"
        checks.fail("token_clip", "be a token's only upper bound", both, "pass one of them")
    if config.use_policy_gradient:
        checks.fail(
            "use_policy_gradient",
            "be False: a divergence summed over the vocabulary does not depend on the sampled "
            "token, so that its expected policy gradient is 0",
            True,
            "pass False, or loss_mode=k1, which is of the sampled token",
        )


def check_rlsd(config: "FusedSDLossConfig") -> None:
    """Check the settings that ``fused_sd_rlsd`` reads; the library's classes check themselves."""
    config.to_surrogate()
    config.to_schedule()
    _check_default(config, ("clip_ratio",), "RLSD (clip_ratio_low and clip_ratio_high bound it)")
    why = {
        "use_task_rewards": "RLSD holds the task's advantages, and verl would add its policy "
        "loss of the same advantages",
        "use_policy_gradient": "RLSD is a policy loss, and verl would take it for a reward",
    }
    for name, reason in why.items():
        if getattr(config, name):
            checks.fail(name, f"be False: {reason}", True, f"pass {name}=False")
    if config.loss_max_clamp is not None:
        checks.fail(
            "loss_max_clamp",
            "be null: cutting the surrogate's value would stop its gradient",
            config.loss_max_clamp,
            "RLSD's bounds are clip_ratio_low, clip_ratio_high and rlsd_dual_clip",
        )


def check_starts_without_adapter(model_config: Any) -> None:
    """Refuse a start from an adapter where the reference is the model without any.

    verl's log-probability pass can leave the adapter out, but has no values of it other than the
    student's.
    """
    adapter = model_config.get("lora_adapter_path")
    if adapter is not None:
        checks.fail(
            "lora_adapter_path",
            'be left out with distillation_loss.teacher="reference" and scored_by="worker", which '
            "has the model without an adapter for a teacher",
            repr(adapter),
            'choose scored_by="engine" or teacher="live", or merge that adapter into the model',
        )
