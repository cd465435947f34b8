"""One of two processes that train verl's FSDP2 engine with a teacher inside it, on CPUs."""

import functools
import os
import pathlib
import traceback
import warnings
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from engine_batches import TEMPERATURE, make_samples
from omegaconf import open_dict
from torch import Tensor

RATE, EVERY, MIX, K, CAP = 0.25, 2, 0.3, 8, 2.0
RANK = 3  # of adapters, so that the two processes hold shards of different sizes
# prompt and response lengths; the second process's last sample has no context
LENGTHS = ((7, 6), (3, 12), (4, 6), (4, 9))
MASK = (1.0, 1.0, 1.0, 0.0)


@dataclass(frozen=True)
class Lesson:
    """One training run of both processes.

    Attributes:
        settings: settings of the loss.
        steps: number of batches that are trained on.
        updates: number of optimiser steps that each batch is trained with.
        same_context: the teacher reads the student's own sequence.
        lora: verl's settings of the student's adapter; empty: train all weights.
        tied: the model's head is its embedding.
        stays_gathered: FSDP keeps the weights whole after a forward.
        offloads: verl moves the weights to the host between batches.
        saved_after: write a checkpoint after this step, and repeat the later steps from it with a
            second engine.
        broken: end with a batch whose first step has an infinite gradient.
    """

    settings: dict[str, Any] = field(default_factory=dict)
    steps: int = 3
    updates: int = 1
    same_context: bool = False
    lora: dict[str, Any] = field(default_factory=dict)
    tied: bool = False
    stays_gathered: bool = False
    offloads: bool = False
    saved_after: int | None = None
    broken: bool = False


FULL = {"support": "full", "divergence": "reverse_kl", "topk": None}
LESSONS = {
    "ema": Lesson({**FULL, "teacher": "ema", "ema_rate": RATE}, saved_after=2),
    "ema, three updates": Lesson(
        {**FULL, "teacher": "ema", "ema_rate": RATE}, steps=2, updates=3, broken=True
    ),
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
    "lora": Lesson({**FULL, "teacher": "reference"}, steps=2, lora={"lora_rank": RANK}),
    "lora, ema": Lesson(
        {**FULL, "teacher": "ema", "ema_rate": RATE},
        lora={
            "lora_rank": RANK,
            "target_modules": ["q_proj", "down_proj"],
            "exclude_modules": ".*layers.0.mlp.*",
        },
        stays_gathered=True,
        saved_after=2,
    ),
    "lora, synced": Lesson(
        {**FULL, "teacher": "synced", "teacher_sync_steps": EVERY},
        # of an untied model, FSDP2 cannot wrap PEFT's layers around head and embedding
        lora={"lora_rank": RANK, "target_modules": ["v_proj", "embed_tokens", "lm_head"]},
        tied=True,
        offloads=True,
        broken=True,
    ),
    "lora, from an adapter": Lesson(
        {**FULL, "teacher": "reference", "trust_region_mix": MIX},
        steps=2,
        lora={"lora_rank": RANK, "lora_adapter_path": "adapter"},
        saved_after=1,
    ),
}


RECIPE = "sdpo"
# response and reward of the four sessions of one prompt
SESSIONS = (("five", 0.0), ("It is 2.", 1.0), ("3", 0.0), ("9", 0.0))
QUESTION = [{"role": "user", "content": "1+1?"}]


def main(rank: int, port: int, folder: str) -> None:
    """Do each lesson, correction and the recipe's run, and save their results in ``folder``."""
    os.environ.update(
        VERL_PLATFORM="cpu",
        TOKENIZERS_PARALLELISM="false",
        VERL_USE_EXTERNAL_PLUGINS="none",
        RANK=str(rank),  # as Ray's workers have them
        WORLD_SIZE="2",
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    torch.set_num_threads(1)
    import cpu_platform  # noqa: F401  registers the platform

    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    os.chdir(folder)  # where the models and the adapter are
    import corrections

    untied = pathlib.Path("untied").absolute()
    cases = corrections.CASES.items()
    runs = {name: functools.partial(teach, name) for name in LESSONS}
    runs |= {name: functools.partial(corrections.update, case, untied) for name, case in cases}
    for name, run in {**runs, RECIPE: follow_recipe}.items():
        try:
            left = run()
        except Exception:
            left = {"error": traceback.format_exc()}
        torch.save(left, f"{name}-{rank}.pt")


def teach(name: str) -> dict[str, Any]:
    """Return the losses, and the weights of student and teacher before each step."""
    from fused_sd.integrations.verl.teacher_state import teacher_file

    lesson = LESSONS[name]
    engine = make_engine(lesson)
    batch, loss = make_batch(lesson), make_loss(lesson)
    left: dict[str, Any] = {"steps": [], "batch": samples(lesson)}
    checkpoint = os.path.abspath(f"checkpoint, {name}")
    for step in range(lesson.steps):
        left["steps"].append(take_step(engine, batch, loss, lesson.updates))
        if lesson.saved_after == step + 1:
            engine.save_checkpoint(checkpoint)
    left["after"] = weights_of(engine)
    if lesson.broken:
        left["broken"] = broken_step(engine, batch, loss, lesson.updates)
    if lesson.saved_after:
        file = teacher_file(checkpoint)
        left["saved"] = torch.load(file, weights_only=True)
        if left["saved"]["kind"] == "frozen":
            os.remove(file)  # as if another teacher had taught: the weights at the start are known
        engine = make_engine(lesson)
        engine.load_checkpoint(checkpoint, del_local_after_load=False)
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            left["resumed"] = [
                take_step(engine, batch, loss) for _ in range(lesson.steps - lesson.saved_after)
            ]
        left["resumed said"] = [str(warning.message) for warning in said]
        left["after resumed"] = weights_of(engine)
        if os.path.exists(file):
            os.remove(file)
            bereft = make_engine(lesson)
            bereft.load_checkpoint(checkpoint, del_local_after_load=False)
            with warnings.catch_warnings(record=True) as said:
                warnings.simplefilter("always")
                left["bereft"] = take_step(bereft, batch, loss)
            left["said"] = [str(warning.message) for warning in said]
    if lesson.lora:
        left["sent"] = [dict(engine.get_per_tensor_param(base_sync_done=True)[0])]
        if "lora_adapter_path" not in lesson.lora:  # PEFT cannot read modules_to_save by layers
            by_layers = engine.get_per_tensor_param(layered_summon=True, base_sync_done=True)[0]
            left["sent"].append(dict(by_layers))
        left["sizes"] = sizes_of(engine)
    return left


def sizes_of(engine: Any) -> dict[str, int]:
    """Return how many numbers this process holds: of the model, of what it trains, of the teacher.

    The teacher's are those that are not the model's.
    """
    parameters = list(engine.module.parameters())
    held = {} if engine._teacher is None else engine._teacher.state_dict()["weights"]
    own = {parameter.to_local().data_ptr() for parameter in parameters}
    assert engine._teacher is None or engine._teacher.module is engine.module
    assert own.isdisjoint(value.to_local().data_ptr() for value in held.values())
    optimized = [p for group in engine.optimizer.param_groups for p in group["params"]]
    assert {*map(id, optimized)} <= {*map(id, parameters)}
    sides = {
        "all": parameters,
        "trained": [parameter for parameter in parameters if parameter.requires_grad],
        "teacher": held.values(),
    }
    return {name: sum(t.to_local().numel() for t in tensors) for name, tensors in sides.items()}


def take_step(engine: Any, batch: Any, loss: Any, updates: int = 1) -> dict[str, Any]:
    """Return the last update's loss, and the weights before the batch and its teacher after it."""
    before = weights_of(engine)
    with engine.train_mode():
        for _ in range(updates):
            with engine.train_mode(disable_auto_offload=True):  # as verl's worker does
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


def broken_step(engine: Any, batch: Any, loss: Any, updates: int) -> dict[str, Any]:
    """Return both sides before and after a batch whose first step's gradient is not finite."""
    before, age = weights_of(engine), engine._teacher.age
    teacher = weights_of(engine, teacher=True)

    take = engine.optimizer_step

    def take_infinite() -> float:
        for parameter in engine.module.parameters():
            if parameter.grad is not None:
                parameter.grad.to_local().fill_(torch.inf)
        return take()

    with engine.train_mode():
        with mock.patch.object(engine, "optimizer_step", take_infinite):
            engine.train_batch(batch.clone(), loss)
        between = weights_of(engine)
        for _ in range(1, updates):
            engine.train_batch(batch.clone(), loss)
    return {
        "students": (before, between, weights_of(engine)),
        "teachers": (teacher, weights_of(engine, teacher=True)),
        "ages": (age, engine._teacher.age),
    }


def weights_of(engine: Any, *, teacher: bool = False) -> dict[str, Tensor] | None:
    """Return the student's whole weights, or the teacher's; None if it has none of its own."""
    if teacher and engine._teacher is None:
        return None
    with engine._teacher.acting() if teacher else nullcontext(engine.module) as module:
        module.reshard()
        return {
            name: (p.full_tensor() if hasattr(p, "full_tensor") else p).detach().clone()
            for name, p in module.named_parameters()
        }


def make_engine(lesson: Lesson, path: Any = None) -> Any:
    """Build an engine of the lesson's model, or of the model at a path."""
    from verl.trainer.config import CheckpointConfig
    from verl.workers.config import FSDPEngineConfig, FSDPOptimizerConfig, HFModelConfig

    from fused_sd.integrations.verl.teachers import TeachingEngine

    torch.manual_seed(0)  # adapters start with random weights
    engine = TeachingEngine(
        model_config=HFModelConfig(
            path=str(path or ("tied" if lesson.tied else "untied")),
            load_tokenizer=False,
            enable_gradient_checkpointing=False,
            use_fused_kernels=True,
            fused_kernel_options={"impl_backend": "fused_sd"},
            override_config={"attn_implementation": "eager"},
            **lesson.lora,
        ),
        engine_config=FSDPEngineConfig(
            strategy="fsdp2",
            mixed_precision=dict.fromkeys(("param_dtype", "reduce_dtype", "buffer_dtype"), "fp32"),
            reshard_after_forward=not lesson.stays_gathered,
            param_offload=lesson.offloads,
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
    """Return all four samples, with what the trainer's stage adds."""
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
    """Return this process's two samples."""
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


def follow_recipe() -> dict[str, Any]:
    """Do two updates with verl's worker, built from a recipe, on the trainer stage's output."""
    from recipes_config import composed
    from verl.utils import tensordict_utils as tu
    from verl.workers.engine_workers import ActorRolloutRefWorker
    from verl.workers.utils.padding import response_from_nested

    from fused_sd.integrations.verl import plugin

    plugin.register_engine("fsdp", ("cpu",))
    os.environ["VERL_ENGINE_VENDOR"] = "fused_sd"
    actor = "actor_rollout_ref.actor"
    config = composed(
        RECIPE,
        "actor_rollout_ref.model.path=untied",
        "actor_rollout_ref.model.enable_gradient_checkpointing=false",
        f"{actor}.fsdp_config.use_torch_compile=false",
        f"{actor}.optim.lr=0.01",
        f"{actor}.optim.lr_warmup_steps=0",
        f"{actor}.optim.total_training_steps=2",
        f"{actor}.ppo_mini_batch_size=4",
    )
    with open_dict(config):
        precision = dict.fromkeys(("param_dtype", "reduce_dtype", "buffer_dtype"), "fp32")
        config.actor_rollout_ref.actor.fsdp_config.mixed_precision = precision
        override = {"attn_implementation": "eager"}
        config.actor_rollout_ref.model.override_config = override
    worker = ActorRolloutRefWorker(
        config.actor_rollout_ref, role="actor", distillation_config=config.distillation
    )
    worker.init_model()
    settings = {"temperature": TEMPERATURE, "calculate_entropy": False}
    batch, left = staged(config), {"steps": []}
    for _ in range(2):
        asked = batch.clone()
        tu.assign_non_tensor(asked, compute_loss=False, **settings)
        found = worker.compute_log_prob(asked)["log_probs"]
        asked = batch.clone()
        asked["old_log_probs"] = response_from_nested(found, batch["response_mask"])
        tu.assign_non_tensor(
            asked,
            distillation_use_topk=True,
            distillation_only=True,
            global_batch_size=4,
            mini_batch_size=4,
            **settings,
        )
        before = weights_of(worker.actor.engine)
        metrics = tu.get(worker.update_actor(asked), "metrics")
        teacher = weights_of(worker.actor.engine, teacher=True)
        left["steps"].append({"before": before, "teacher": teacher, "metrics": metrics})
    left["engine"] = type(worker.actor.engine).__name__
    left["after"] = weights_of(worker.actor.engine)
    left["samples"] = [
        {name: values[n] for name, values in batch.items() if isinstance(values, Tensor)}
        for n in range(len(batch))
    ]
    return left


def staged(config: Any) -> Any:
    """Return this process's two of four samples, as the trainer's stage writes them."""
    from chat_tokenizer import ids, tokenizer
    from verl.utils import tensordict_utils as tu

    from fused_sd.integrations.verl.batch_rollouts import read_rollouts
    from fused_sd.integrations.verl.contexts import PromptTokenizer
    from fused_sd.integrations.verl.teacher_sequences import mask_without_context, teacher_batch
    from fused_sd.integrations.verl.trainer import self_distillation_config

    words = PromptTokenizer(tokenizer())
    prompt = torch.tensor(words.chat(QUESTION))
    responses = [torch.tensor([*ids(t), tokenizer().eos_token_id]) for t, _ in SESSIONS]
    jagged = functools.partial(torch.nested.as_nested_tensor, layout=torch.jagged)
    data = tu.get_tensordict(
        {
            "uid": ["u"] * 4,
            "raw_prompt": [QUESTION] * 4,
            "extra_fields": [{}] * 4,
            "prompts": jagged([prompt] * 4),
            "responses": jagged(responses),
            "rm_scores": jagged(
                [torch.full((len(r),), s / len(r)) for r, (_, s) in zip(responses, SESSIONS)]
            ),
            "response_mask": jagged([torch.ones(len(r), dtype=torch.int64) for r in responses]),
            "input_ids": jagged([torch.cat([prompt, r]) for r in responses]),
            "position_ids": jagged([torch.arange(len(prompt) + len(r)) for r in responses]),
        }
    )
    keys = [f"u_{n}_0" for n in range(4)]
    rollouts = read_rollouts(data, keys, tokenizer(), reference_key=None, feedback_key="feedback")
    context = self_distillation_config(config).context
    prompts = [rollout and context.teacher_prompt(rollout, words) for rollout in rollouts]
    teacher = teacher_batch(data["prompts"].unbind(), responses, prompts)
    for name, values in teacher.fields().items():
        data[name] = values
    data["loss_mask"] = mask_without_context(data["response_mask"], teacher.mask)
    for name in ("uid", "raw_prompt", "extra_fields"):
        tu.pop(data, name)
    return tu.index_select_tensor_dict(data, [2 * dist.get_rank(), 2 * dist.get_rank() + 1])
