"""One of two processes in which verl's FSDP2 engine is taught by weights other than its own."""

import functools
import os
import pathlib
import traceback
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from engine_worker import TEMPERATURE, make_samples
from torch import Tensor

RATE, EVERY, MIX, K, CAP = 0.25, 2, 0.3, 8, 2.0
# prompt and response lengths; the second process's last sample has no context
LENGTHS = ((7, 6), (3, 12), (4, 6), (4, 9))
MASK = (1.0, 1.0, 1.0, 0.0)


@dataclass(frozen=True)
class Lesson:
    """A training run of both processes.

    Attributes:
        settings: of the loss.
        steps: of the optimiser.
        same_context: the teacher reads the student's own sequence.
        lora: rank of the student's adapter; 0: all weights are trained.
        saved_after: the step after which a checkpoint is written, and from which a second engine
            takes the last steps again.
        broken: a step with an infinite gradient follows the last.
    """

    settings: dict[str, Any] = field(default_factory=dict)
    steps: int = 3
    same_context: bool = False
    lora: int = 0
    saved_after: int | None = None
    broken: bool = False


FULL = {"support": "full", "divergence": "reverse_kl", "topk": None}
LESSONS = {
    "ema": Lesson({**FULL, "teacher": "ema", "ema_rate": RATE}, saved_after=2),
    "trust region": Lesson(
        {
            "teacher": "reference",
            "trust_region_mix": MIX,
            "support": "student_topk",
            "divergence": "reverse_kl",
            "topk": K,
            "importance_cap": CAP,
        },
        steps=2,
    ),
    "synced, rlsd": Lesson(
        {"loss_mode": "fused_sd_rlsd", "teacher": "synced", "teacher_sync_steps": EVERY},
        broken=True,
    ),
    "live, same context": Lesson({**FULL, "teacher": "live"}, steps=1, same_context=True),
    "ema, same context": Lesson({**FULL, "teacher": "ema"}, steps=1, same_context=True),
    "lora": Lesson({**FULL, "teacher": "reference"}, steps=2, lora=4),
    "lora, ema": Lesson({**FULL, "teacher": "ema"}, steps=1, lora=4),
}


def main(rank: int, port: int, folder: str) -> None:
    """Do each lesson, and leave what is left of it in ``folder``."""
    os.environ.update(VERL_PLATFORM="cpu", TOKENIZERS_PARALLELISM="false")
    torch.set_num_threads(1)
    import cpu_platform  # noqa: F401  registers the platform

    torch.cpu.set_rng_state = torch.set_rng_state  # verl asks the device's module, to load
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    for name, lesson in LESSONS.items():
        try:
            left = teach(lesson, pathlib.Path(folder) / "untied")
        except Exception:
            left = {"error": traceback.format_exc()}
        torch.save(left, pathlib.Path(folder) / f"{name}-{rank}.pt")
    dist.destroy_process_group()


def teach(lesson: Lesson, model: pathlib.Path) -> dict[str, Any]:
    """Losses, and the weights of both sides before each step."""
    engine = make_engine(lesson, model)
    batch, loss = make_batch(lesson), make_loss(lesson)
    left: dict[str, Any] = {"steps": [], "batch": samples(lesson)}
    checkpoint = str(model.parent / "checkpoint")
    for step in range(lesson.steps):
        left["steps"].append(take_step(engine, batch, loss))
        if lesson.saved_after == step + 1:
            engine.save_checkpoint(checkpoint)
    left["after"] = weights_of(engine)
    if lesson.broken:
        left["broken"] = broken_step(engine, batch.clone(), loss)
    if lesson.saved_after:
        engine = make_engine(lesson, model)
        engine.load_checkpoint(checkpoint, del_local_after_load=False)
        left["resumed"] = [
            take_step(engine, batch, loss) for _ in range(lesson.steps - lesson.saved_after)
        ]
        left["after resumed"] = weights_of(engine)
    if lesson.lora:
        left["has a copy"] = engine._teacher is not None
    return left


def take_step(engine: Any, batch: Any, loss: Any) -> dict[str, Any]:
    before = weights_of(engine)
    with engine.train_mode():
        output = engine.train_batch(batch.clone(), loss)
    total = torch.tensor(output["loss"], dtype=torch.float64).sum()
    dist.all_reduce(total)
    return {
        "loss": float(total) / 2,
        "grad_norm": float(output["metrics"]["grad_norm"]),
        "metrics": {name: value for name, value in output["metrics"].items() if "/" in name},
        "before": before,
        "teacher": weights_of(engine, teacher=True),
    }


def broken_step(engine: Any, batch: Any, loss: Any) -> dict[str, Any]:
    """What both sides are before and after a gradient that is not finite."""
    before, age = weights_of(engine, teacher=True), engine._teacher.age
    batch["advantages"] = torch.nested.nested_tensor_from_jagged(
        batch["advantages"].values() * torch.inf, batch["advantages"].offsets()
    )
    with engine.train_mode():
        engine.train_batch(batch, loss)
    return {
        "before": before,
        "after": weights_of(engine, teacher=True),
        "ages": (age, engine._teacher.age),
    }


def weights_of(engine: Any, *, teacher: bool = False) -> dict[str, Tensor] | None:
    """Whole weights, of a teacher in its second module after a step; None where it has none."""
    module = engine.module
    if teacher:
        if engine._teacher is None:
            return None
        module = engine._teacher.module
    module.reshard()
    return {
        name: (p.full_tensor() if hasattr(p, "full_tensor") else p).detach().clone()
        for name, p in module.named_parameters()
    }


def make_engine(lesson: Lesson, model: pathlib.Path) -> Any:
    from verl.trainer.config import CheckpointConfig
    from verl.workers.config import FSDPEngineConfig, FSDPOptimizerConfig, HFModelConfig

    from fused_sd.integrations.verl.teachers import TeachingEngine

    torch.manual_seed(0)  # of an adapter's first weights
    engine = TeachingEngine(
        model_config=HFModelConfig(
            path=str(model),
            load_tokenizer=False,
            enable_gradient_checkpointing=False,
            use_fused_kernels=True,
            fused_kernel_options={"impl_backend": "fused_sd"},
            override_config={"attn_implementation": "eager"},
            lora_rank=lesson.lora,
        ),
        engine_config=FSDPEngineConfig(
            strategy="fsdp2",
            mixed_precision=dict.fromkeys(("param_dtype", "reduce_dtype", "buffer_dtype"), "fp32"),
            use_torch_compile=False,
        ),
        optimizer_config=FSDPOptimizerConfig(lr=1e-2, total_training_steps=lesson.steps),
        checkpoint_config=CheckpointConfig(),
    )
    engine.initialize()
    return engine


def make_loss(lesson: Lesson) -> Any:
    from verl.trainer.distillation import distillation_ppo_loss
    from verl.workers.config import FSDPActorConfig, FSDPEngineConfig

    from fused_sd.integrations.verl.config import FusedSDLossConfig
    from fused_sd.integrations.verl.contexts import ReferenceContext
    from fused_sd.integrations.verl.self_distillation import SelfDistillationConfig

    actor = FSDPActorConfig(
        strategy="fsdp2",
        ppo_micro_batch_size_per_gpu=1,
        rollout_n=1,
        fsdp_config=FSDPEngineConfig(strategy="fsdp2"),
    )
    loss = FusedSDLossConfig(use_task_rewards=False, **lesson.settings)
    distillation = SelfDistillationConfig(
        enabled=True, distillation_loss=loss, context=ReferenceContext()
    )
    return functools.partial(distillation_ppo_loss, config=actor, distillation_config=distillation)


def is_policy(lesson: Lesson) -> bool:
    return lesson.settings.get("loss_mode") == "fused_sd_rlsd"


def samples(lesson: Lesson) -> list[dict[str, Tensor]]:
    """All four, with what the trainer's stage adds."""
    found = []
    for sample, mask in zip(make_samples(LENGTHS), MASK, strict=True):
        sample = {**sample, "self_distillation_mask": torch.tensor(mask)}
        del sample["teacher_ids"], sample["teacher_logprobs"]  # there is no server
        if not is_policy(lesson):
            sample["loss_mask"] = (sample["response_mask"] * mask).long()
        if lesson.same_context or not mask:
            for name in ("input_ids", "position_ids"):
                sample[f"teacher_{name}"] = sample[name]
        found.append(sample)
    return found


def make_batch(lesson: Lesson) -> Any:
    """This process's two samples."""
    from verl.utils import tensordict_utils as tu

    own = samples(lesson)[2 * dist.get_rank() : 2 * dist.get_rank() + 2]
    tensors = {}
    for name in own[0]:
        column = [sample[name] for sample in own]
        is_number = column[0].dim() == 0
        tensors[name] = (
            torch.stack(column)
            if is_number
            else torch.nested.as_nested_tensor(column, layout=torch.jagged)
        )
    batch = tu.get_tensordict(tensors)
    tu.assign_non_tensor(
        batch,
        use_remove_padding=True,
        use_fused_kernels=True,
        calculate_entropy=False,
        distillation_use_topk=not is_policy(lesson),
        distillation_only=not is_policy(lesson),
        temperature=TEMPERATURE,
        global_batch_size=4,
        use_dynamic_bsz=False,
        micro_batch_size_per_gpu=1,
    )
    return batch
