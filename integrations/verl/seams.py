"""What the adapter needs of verl beyond the names that it imports.

verl declares none of these methods public.  A name that is imported and gone fails at once; a
method that verl renamed does not: ours then stands before nothing, and is never called.  The
trainer, for one, would train without its teacher.  So a part is registered only if verl still has
what the part overrides, calls or replaces.
"""

import importlib
import inspect
from typing import Any

from fused_sd.checks import fail
from fused_sd.integrations.verl import SUPPORTED_VERL

_TRAINER = "verl.trainer.ppo.v1.trainer_base"
_FSDP = "verl.workers.engine.fsdp.transformer_impl"
_MEGATRON = "verl.workers.engine.megatron.transformer_impl"
_FUSED_FORWARD = "verl.models.mcore.model_forward_fused"

SEAMS: dict[str, dict[str, tuple[str, ...]]] = {
    # part of ``plugin.STATUS``: module: names, with a dot before a class's method
    "losses": {
        "verl.trainer.distillation.losses": (
            "DISTILLATION_LOSS_REGISTRY",
            "DistillationLossSettings",
            "compute_forward_kl_topk",
            "register_distillation_loss",
        ),
        "verl.utils.metric": ("AggregationType", "Metric"),
        "verl.utils.tensordict_utils": ("assign_non_tensor", "get_non_tensor_data"),
        "verl.workers.config": (
            "DistillationConfig",
            "DistillationLossConfig.__post_init__",
            "DistillationLossConfig.loss_settings",
        ),
        "verl.workers.utils.padding": ("no_padding_2_padding",),
    },
    "fsdp": {
        "verl.utils.fsdp_utils": ("load_fsdp_model_to_gpu", "offload_fsdp_model_to_cpu"),
        "verl.workers.engine.base": (
            "EngineRegistry._engines",
            "EngineRegistry.get_engine_cls",
            "EngineRegistry.register",
        ),
        _FSDP: tuple(
            f"FSDPEngineWithLMHead.{name}"
            for name in (
                "_build_fsdp_module",
                "_build_model_optimizer",
                "_build_module",
                "_gather_and_unpad_packed",
                "disable_adapter",
                "forward_step",
                "load_checkpoint",
                "optimizer_step",
                "prepare_model_inputs",
                "prepare_model_outputs",
                "save_checkpoint",
                "to",
                "train_mode",
            )
        ),
    },
    "megatron": {
        "verl.models.mcore.util": ("preprocess_thd_engine",),
        "verl.utils.model": ("CausalLMOutputForPPO",),
        _FUSED_FORWARD: (
            "_supports_output_processor_hook",
            "_use_output_processor_hook",
            "fused_forward_model_engine",
            "fused_output_processor",
        ),
        _MEGATRON: (
            "MegatronEngineWithLMHead._get_context_parallel_layout",
            "MegatronEngineWithLMHead._maybe_enable_fused_kernels",
            "MegatronEngineWithLMHead.forward_step",
        ),
    },
    "trainer": {
        "verl.experimental.agent_loop.agent_loop": ("AgentLoopWorker._compute_position_ids",),
        _TRAINER: (
            "PPOTrainer.__init__",
            "PPOTrainer._compute_advantage",
            "PPOTrainer._init_dataloader",
            "PPOTrainer._init_resource_pool_mgr",
            "PPOTrainer._setup",
            "register_trainer",
        ),
        "verl.trainer.ppo.v1": ("PPOTrainerColocateAsync", "PPOTrainerSync"),
        "verl.utils.tokenizer": ("normalize_token_ids",),
        "verl.workers.engine_workers": (
            "ActorRolloutRefWorker.compute_log_prob",
            "ActorRolloutRefWorker.compute_ref_log_prob",
        ),
    },
}


def names(part: str) -> list[tuple[str, str]]:
    """List a part's seams as (module, name)."""
    return [(module, name) for module, found in SEAMS[part].items() for name in found]


def find(module: str, name: str) -> Any:
    """Return what a seam names, without running a descriptor.

    Raises:
        ImportError, AttributeError: verl does not have it.
    """
    found: Any = importlib.import_module(module)
    for one in name.split("."):
        found = inspect.getattr_static(found, one)
    return found


def missing(part: str) -> list[str]:
    """List those seams of a part that the installed verl does not have.

    Raises:
        ImportError: something that verl imports is not installed.
    """
    gone = []
    for module, name in names(part):
        try:
            find(module, name)
        except AttributeError:
            gone.append(f"{module}.{name}")
        except ModuleNotFoundError as error:
            if not str(error.name).startswith("verl"):
                raise  # something that verl needs is missing, nothing of verl's
            gone.append(f"{module}.{name}")
    return gone


def check(part: str) -> None:
    """Refuse a verl without a part's seams.

    Raises:
        ValueError: something that the part needs is gone from verl.
        ImportError: something that verl imports is not installed.
    """
    gone = missing(part)
    if gone:
        fail(
            "verl",
            f"have what fused_sd's {part} needs",
            f"one without {', '.join(gone)}",
            f"install verl{SUPPORTED_VERL}, or a fused_sd that supports this verl",
        )
