"""Checks of a whole verl configuration, before anything is started.

The recipes name ``BeforeRun`` as a callback of Hydra's, which runs in ``main_ppo`` before Ray is
started; the trainers of self-distillation check again where a configuration came another way.

The settings classes check themselves.  Here stands what concerns more than one section: what verl
would ignore, what would fail in a worker after minutes, or where verl's own message misleads.
"""

import os
from typing import Any

import torch
from hydra.experimental.callback import Callback
from omegaconf import DictConfig
from verl.trainer.distillation import is_distillation_enabled
from verl.trainer.ppo.rollout_corr_helper import compute_rollout_correction_and_rejection_mask
from verl.utils.config import omega_conf_to_dataclass
from verl.workers.config import DistillationConfig, DistillationLossConfig

from fused_sd.checks import fail
from fused_sd.integrations.verl import ENGINES, RLSD_LOSS, TOPK_LOSS, TRAINER_MODES, VENDOR
from fused_sd.integrations.verl.contexts import (
    ReferenceContext,
    SamePromptContext,
    SiblingContext,
)
from fused_sd.integrations.verl.self_distillation import SelfDistillationConfig

OWN_LOSSES = (TOPK_LOSS, RLSD_LOSS)
FSDP, STRATEGIES = ("fsdp", "fsdp2"), ("fsdp", "fsdp2", "megatron")
_VERLS_MODES = ("sync", "colocate_async", "separate_async")
_MODEL, _ACTOR = "actor_rollout_ref.model", "actor_rollout_ref.actor"


class BeforeRun(Callback):
    """Stops ``main_ppo`` with the message of the first check that fails.

    Hydra turns an exception of a callback into a warning, but lets ``SystemExit`` pass.
    """

    def on_job_start(self, config: DictConfig, **kwargs: Any) -> None:
        try:
            check_run(config)
        except Exception as error:
            # Hydra wraps what a settings class raises; the cause has the message
            raise SystemExit(f"fused_sd: {error.__cause__ or error}") from error


def check_run(config: DictConfig) -> None:
    """Check a whole configuration, if it distils with something of ours.

    Raises:
        ValueError: settings of different sections do not go together, or one would be ignored.
    """
    if not is_distillation_enabled(config.get("distillation")):
        return
    settings: DistillationConfig = omega_conf_to_dataclass(config.distillation)
    loss = settings.distillation_loss
    if isinstance(settings, SelfDistillationConfig):
        _check_trainer(config)
        _check_context(config, settings)
        if settings.scored_by == "engine":
            _check_local_teacher(config, settings)
    if _needs_engine(config, settings):
        _check_engine(config)
    if loss.loss_mode in OWN_LOSSES:
        _check_clip(config)
        _check_unread(config, loss)
        _check_correction(config, loss)


def _check_trainer(config: DictConfig) -> None:
    """Refuse trainers without the stage that shows the teacher its context."""
    known = " or ".join(TRAINER_MODES)
    if not config.trainer.use_v1:
        rule = "be True with SelfDistillationConfig: the older trainer shows the teacher nothing"
        fail("trainer.use_v1", rule, False, f"set it, and trainer.v1.trainer_mode={known}")
    mode = config.trainer.v1.trainer_mode
    if mode in _VERLS_MODES:
        rule = "be a trainer that shows the teacher its context with SelfDistillationConfig"
        fail("trainer.v1.trainer_mode", rule, repr(mode), f"set {known}")
    if _vendor(config) != VENDOR:
        fail(
            "VERL_ENGINE_VENDOR",
            f"be {VENDOR} where verl is imported, or fused_sd does not register its trainers",
            repr(_vendor(config)),
            f"set ray_kwargs.ray_init.runtime_env.env_vars.VERL_ENGINE_VENDOR={VENDOR}",
        )


def _vendor(config: DictConfig) -> str | None:
    """Return the variable's value in Ray's processes, which the configuration may set."""
    environment = (config.ray_kwargs.ray_init.get("runtime_env") or {}).get("env_vars") or {}
    vendor: str | None = environment.get("VERL_ENGINE_VENDOR", os.getenv("VERL_ENGINE_VENDOR"))
    return vendor


def _check_context(config: DictConfig, settings: SelfDistillationConfig) -> None:
    """Refuse a context that has nothing to show in any batch."""
    context = settings.context
    if isinstance(context, ReferenceContext) and settings.reference_key is None:
        fail(
            "distillation.reference_key",
            f"name what {type(context).__name__} shows",
            None,
            "name a column of the dataset, as reward_model.ground_truth",
        )
    if isinstance(context, SamePromptContext) and settings.loss.teacher == "live":
        fail(
            "distillation.context",
            "show the teacher more than the student's prompt, or the teacher have other weights",
            'SamePromptContext with teacher="live", whose divergence is 0',
            "choose another of the two",
        )
    if isinstance(context, SiblingContext):
        has_feedback = context.include_environment_feedback and settings.feedback_key is not None
        others = config.actor_rollout_ref.rollout.n > 1 or not context.dont_reprompt_on_self_success
        if not has_feedback and not (context.use_successful_as_teacher and others):
            got = (
                f"feedback_key={settings.feedback_key!r}, rollout.n="
                f"{config.actor_rollout_ref.rollout.n} and {context}"
            )
            rule = "have a successful sibling or feedback to show"
            remedy = "set distillation.feedback_key, or actor_rollout_ref.rollout.n above 1"
            fail("distillation.context", rule, got, remedy)


def _check_local_teacher(config: DictConfig, settings: SelfDistillationConfig) -> None:
    """Refuse strategies whose engine cannot hold the teacher."""
    strategy, teacher = config.actor_rollout_ref.actor.strategy, settings.loss.teacher
    starts_from_adapter = config.actor_rollout_ref.model.get("lora_adapter_path") is not None
    # such a teacher's values are kept shard by shard, which FSDP's flat buffers do not allow
    has_shards = teacher in ("ema", "synced") or (teacher == "reference" and starts_from_adapter)
    if strategy not in FSDP or (has_shards and strategy != "fsdp2"):
        rule = 'be "fsdp2"' + ("" if has_shards else ' or "fsdp"')
        fail(
            f"{_ACTOR}.strategy",
            f"{rule} for distillation_loss.teacher={teacher!r} in the training process",
            repr(strategy),
            "set fsdp2, or distil from a teacher server",
        )


def _needs_engine(config: DictConfig, settings: DistillationConfig) -> bool:
    """Whether a loss needs our engine, or the model asks for it."""
    if isinstance(settings, SelfDistillationConfig) and settings.scored_by == "engine":
        return True
    model = config.actor_rollout_ref.model
    asks = (model.get("fused_kernel_options") or {}).get("impl_backend") == VENDOR
    is_topk = settings.distillation_loss.loss_mode == TOPK_LOSS
    return is_topk or (asks and bool(model.use_fused_kernels))


def _check_engine(config: DictConfig) -> None:
    """Refuse a configuration with which the workers would run verl's own engine."""
    model, strategy = config.actor_rollout_ref.model, config.actor_rollout_ref.actor.strategy
    remedy = f"set {_MODEL}.use_fused_kernels=True and fused_kernel_options.impl_backend={VENDOR}"
    rule = "be {} for a loss that fused_sd's engine computes"
    if not model.use_fused_kernels:
        fail(f"{_MODEL}.use_fused_kernels", rule.format(True), model.use_fused_kernels, remedy)
    backend = (model.get("fused_kernel_options") or {}).get("impl_backend")
    if backend != VENDOR:
        name = f"{_MODEL}.fused_kernel_options.impl_backend"
        fail(name, rule.format(VENDOR), repr(backend), remedy)
    if strategy not in STRATEGIES:
        options = " or ".join(STRATEGIES)
        fail(f"{_ACTOR}.strategy", rule.format(options), repr(strategy), "set fsdp2")
    libraries = model.get("external_lib")
    is_imported = ENGINES in ([libraries] if isinstance(libraries, str) else libraries or ())
    if _vendor(config) != VENDOR and not is_imported:
        fail(
            f"{_MODEL}.external_lib",
            "register fused_sd's engines in the workers",
            f"{libraries!r}, and VERL_ENGINE_VENDOR is {_vendor(config)!r}",
            f"set {_MODEL}.external_lib={ENGINES}, or "
            f"+ray_kwargs.ray_init.runtime_env.env_vars.VERL_ENGINE_VENDOR={VENDOR}",
        )


def _check_clip(config: DictConfig) -> None:
    """Refuse a bound of the gradient's norm where verl's engines do not read it."""
    bound = config.actor_rollout_ref.actor.get("grad_clip", 1.0)
    if bound != 1.0:
        read = f"{_ACTOR}.optim.clip_grad"
        rule = f"be left at 1.0: verl's engines read {read}"
        fail(f"{_ACTOR}.grad_clip", rule, bound, f"set {read}={bound}")


def _check_unread(config: DictConfig, loss: DistillationLossConfig) -> None:
    """Refuse what verl reads in its policy loss alone, where it computes none."""
    if loss.use_task_rewards:
        return
    actor = config.actor_rollout_ref.actor
    # kl_loss_coef=0 is how to have verl's reference worker and no loss of it
    found: dict[str, tuple[Any, bool]] = {
        f"{_ACTOR}.entropy_coeff": (actor.entropy_coeff, actor.entropy_coeff == 0),
        f"{_ACTOR}.use_kl_loss": (True, not actor.use_kl_loss or actor.kl_loss_coef == 0),
        f"{_ACTOR}.policy_loss.loss_mode": (
            actor.policy_loss.loss_mode,
            actor.policy_loss.loss_mode == "vanilla",
        ),
    }
    if loss.loss_mode == TOPK_LOSS:
        estimator = config.algorithm.adv_estimator
        has_critic = config.critic.enable or (config.critic.enable is None and estimator == "gae")
        in_reward = config.algorithm.use_kl_in_reward
        found["critic.enable"] = (True, not has_critic)
        found["algorithm.use_kl_in_reward"] = (in_reward, not in_reward)
    remedy = "leave it out"
    if loss.loss_mode == TOPK_LOSS:
        remedy += ", or set distillation_loss.use_task_rewards=True to add the policy loss"
    where = f"loss_mode={loss.loss_mode!r} alone, which verl computes without its policy loss"
    for name, (value, fine) in found.items():
        if not fine:
            fail(name, f"be left at its default with {where}", repr(value), remedy)


def _check_correction(config: DictConfig, loss: DistillationLossConfig) -> None:
    """Refuse a correction for the rollout engine that verl would leave out in silence."""
    section = "algorithm.rollout_correction"
    correction = config.algorithm.get("rollout_correction") or {}
    asked = [name for name in ("rollout_is", "rollout_rs") if correction.get(name) is not None]
    bypasses = bool(correction.get("bypass_mode"))
    policy_loss = config.actor_rollout_ref.actor.policy_loss.loss_mode
    if bypasses and asked and not (loss.use_task_rewards and policy_loss == "bypass_mode"):
        fail(
            f"{section}.{asked[0]}",
            "be null with bypass_mode=True, with which verl weighs and rejects nothing",
            repr(correction[asked[0]]),
            "set bypass_mode=False; with True, importance_cap and RLSD's ratio are already "
            "relative to the rollout engine",
        )
    if (asked or bypasses) and not config.actor_rollout_ref.rollout.calculate_log_probs:
        fail(
            "actor_rollout_ref.rollout.calculate_log_probs",
            f"be True with {section}.{asked[0] if asked else 'bypass_mode'}",
            False,
            "set it; without the rollout engine's log-probabilities verl corrects nothing",
        )
    if asked:
        token = torch.zeros(1, 1)
        names = ("rollout_is", "rollout_is_threshold", "rollout_rs", "rollout_rs_threshold")
        given = {name: correction[name] for name in names if name in correction}
        # verl would refuse a wrong name or threshold after the first rollouts, with its own message
        compute_rollout_correction_and_rejection_mask(token, token, torch.ones(1, 1), **given)
