"""Updates of a recipe's student by verl's worker, in the two processes of ``teacher_worker``.

Each case is one call of ``update_actor`` with what the trainer's stage leaves in the batch.
"""

import os
import pathlib
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from engine_batches import TEMPERATURE, make_samples
from omegaconf import open_dict
from teacher_worker import weights_of
from torch import Tensor

RATE, CAP = 0.25, 2.0
LENGTHS = ((7, 6), (3, 12), (4, 6), (4, 9))
LOSS = "distillation.distillation_loss"
FULL = (f"{LOSS}.divergence=reverse_kl", f"{LOSS}.beta=0.5", f"{LOSS}.support=full")
LIVE = (*FULL, f"{LOSS}.teacher=live", f"{LOSS}.ema_rate=0.05", f"{LOSS}.importance_cap=null")


@dataclass(frozen=True)
class Case:
    """One update.

    Attributes:
        settings: of the recipe.
        weights: the batch holds ``rollout_is_weights``.
        rejected: verl has rejected all of the first sample, and two tokens of the second.
        other: the first sample's response is another one.
        contexts: whether each sample has a context.
        mini_batch_size, epochs: of all processes.
    """

    settings: tuple[str, ...] = LIVE
    weights: bool = False
    rejected: bool = False
    other: bool = False
    contexts: tuple[int, ...] = (1, 1, 1, 1)
    mini_batch_size: int = 4
    epochs: int = 1


def micro(size: int) -> tuple[str, ...]:
    """Settings of micro-batches with a fixed number of samples."""
    parts = ("actor.use_dynamic_bsz", "rollout.log_prob_use_dynamic_bsz")
    off = tuple(f"actor_rollout_ref.{part}=false" for part in parts)
    sizes = ("actor.ppo_micro_batch_size_per_gpu", "rollout.log_prob_micro_batch_size_per_gpu")
    return (*off, *(f"actor_rollout_ref.{name}={size}" for name in sizes))


def dynamic(tokens: int) -> tuple[str, ...]:
    return (f"actor_rollout_ref.actor.ppo_max_token_len_per_gpu={tokens}",)


RLSD = (
    f"{LOSS}.loss_mode=fused_sd_rlsd",
    *(f"{LOSS}.{name}" for name in ("divergence=forward_kl", "support=teacher_topk")),
    *(f"{LOSS}.{name}" for name in ("teacher=live", "ema_rate=0.05", "importance_cap=null")),
)
CASES = {
    "weights": Case(weights=True),
    # the first process's first micro-batch keeps no token
    "rejected": Case((*LIVE, *micro(1)), weights=True, rejected=True),
    "rejected, another response": Case((*LIVE, *micro(1)), weights=True, rejected=True, other=True),
    "rejected, rlsd": Case((*RLSD, *micro(1)), weights=True, rejected=True),
    "one at a time": Case((*LIVE, *micro(1)), contexts=(1, 1, 1, 0)),
    "two at a time": Case((*LIVE, *micro(2)), contexts=(1, 1, 1, 0)),
    "dynamic, small": Case((*LIVE, *dynamic(16)), contexts=(1, 1, 1, 0)),
    "pace": Case(
        (*FULL, f"{LOSS}.importance_cap=null", f"{LOSS}.ema_rate={RATE}"),
        mini_batch_size=2,
        epochs=2,
    ),
}


def update(case: Case, model: pathlib.Path) -> dict[str, Any]:
    """Return the metrics, and both sides' weights before and after."""
    from verl.utils import tensordict_utils as tu

    worker = make_worker(case, model)
    engine = worker.actor.engine
    before = weights_of(engine)
    batch = tu.index_select_tensor_dict(
        make_batch(case), [2 * dist.get_rank(), 2 * dist.get_rank() + 1]
    )
    is_topk = "rlsd" not in str(case.settings)
    tu.assign_non_tensor(
        batch,
        temperature=TEMPERATURE,
        calculate_entropy=False,
        distillation_use_topk=is_topk,
        distillation_only=is_topk,
        global_batch_size=case.mini_batch_size,
        mini_batch_size=case.mini_batch_size,
        epochs=case.epochs,
    )
    metrics = tu.get(worker.update_actor(batch), "metrics")
    return {
        "metrics": metrics,
        "before": before,
        "after": weights_of(engine),
        "teacher": weights_of(engine, teacher=True),
        "engine": type(engine).__name__,
        "vendor": os.environ.get("VERL_ENGINE_VENDOR"),
    }


def make_worker(case: Case, model: pathlib.Path) -> Any:
    from recipes_config import composed
    from verl.workers.engine_workers import ActorRolloutRefWorker

    actor = "actor_rollout_ref.actor"
    config = composed(
        "sdpo",
        f"actor_rollout_ref.model.path={model}",
        "actor_rollout_ref.model.enable_gradient_checkpointing=false",
        # the registering module instead of the variable in the environment
        "actor_rollout_ref.model.external_lib=fused_sd.integrations.verl.engines",
        f"{actor}.fsdp_config.use_torch_compile=false",
        f"{actor}.optim.lr=0.001",
        f"{actor}.optim.lr_warmup_steps=0",
        f"{actor}.optim.total_training_steps=8",
        *case.settings,
    )
    with open_dict(config):
        precision = dict.fromkeys(("param_dtype", "reduce_dtype", "buffer_dtype"), "fp32")
        config.actor_rollout_ref.actor.fsdp_config.mixed_precision = precision
        override = {"attn_implementation": "eager"}
        config.actor_rollout_ref.model.override_config = override
        # with Adam's usual eps, a gradient of rounding errors would make a full step
        config.actor_rollout_ref.actor.optim.override_optimizer_config = {"eps": 1e-6}
    worker = ActorRolloutRefWorker(
        config.actor_rollout_ref, role="actor", distillation_config=config.distillation
    )
    worker.init_model()
    return worker


def samples(case: Case) -> list[dict[str, Tensor]]:
    """Return all four samples, with what verl's and the trainer's stages add."""
    generator = torch.Generator().manual_seed(1)
    found = []
    for n, sample in enumerate(make_samples(LENGTHS)):
        del sample["teacher_ids"], sample["teacher_logprobs"]  # there is no server
        mask = sample["response_mask"].clone()
        if case.weights:
            weights = 2 * torch.rand(len(mask), generator=generator)
            sample["rollout_is_weights"] = weights * mask
        if case.rejected and n == 0:
            mask[:] = 0
            if case.other:
                for name in ("input_ids", "responses", "teacher_input_ids"):
                    sample[name] = sample[name].clone()
                    sample[name][-len(mask) :] = 5
        if case.rejected and n == 1:
            mask[1:3] = 0
        has_context = case.contexts[n]
        sample["response_mask"] = mask
        is_policy = "rlsd" in str(case.settings)
        sample["loss_mask"] = mask if is_policy else mask * has_context
        sample["self_distillation_mask"] = torch.tensor(float(has_context))
        if not has_context:
            for name in ("input_ids", "position_ids"):
                sample[f"teacher_{name}"] = sample[name]
        found.append(sample)
    return found


def make_batch(case: Case) -> Any:
    from verl.utils import tensordict_utils as tu

    rows = samples(case)
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    return tu.get_tensordict(
        {
            name: torch.stack(column)
            if column[0].dim() == 0
            else torch.nested.as_nested_tensor(column, layout=torch.jagged)
            for name, column in columns.items()
        }
    )
