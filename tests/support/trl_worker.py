"""One of two processes that train a method's trainer on completions that are known beforehand.

The same ``Run`` in one process has the same rows in the same order, so that weights, teachers and
logs are to be equal.
"""

import functools
import os
import pathlib
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import peft
import torch
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from method_pairs import DATA, GROUP, make, model
from torch.distributed.fsdp import _init_utils as fsdp1
from transformers import TrainerCallback
from transformers.models.qwen3.modeling_qwen3 import Qwen3RotaryEmbedding
from trl import GRPOTrainer as StockGRPOTrainer
from trl.trainer import grpo_trainer

GOOD, BAD, END = 40, 41, 1
LORA = {"r": 1, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": False}
ONE_STEP = {
    "loss_type": "dapo",
    "optim": "sgd",
    "learning_rate": 1.0,
    "weight_decay": 0.0,
    "max_grad_norm": 0.0,
}


@dataclass(frozen=True)
class Run:
    """A training run.

    Attributes:
        success: of each row of a generation batch, over both processes.
        settings: of the trainer, where they differ from ``ONE_STEP``.
        steps: of the optimiser.
        broken: the only process whose gradient is NaN.
        fsdp: version of the FSDP that shards; 0: replicated.
        adapter: trains LoRA.
        resumed: saved after each step, and continued by another trainer after the first.
        from_path: the trainer loads the model, from the folder ``model`` beside the run's.
        dtype: of the model.
    """

    method: str
    success: tuple[int, ...] = (0, 0, 1, 0)
    settings: dict[str, Any] = field(default_factory=dict)
    steps: int = 1
    broken: int | None = None
    fsdp: int = 0
    adapter: bool = False
    resumed: bool = False
    from_path: bool = False
    dtype: torch.dtype = torch.float64


EMA = {"teacher_model_kind": "ema", "teacher_update_rate": 0.3}
SYNCED = {"teacher_model_kind": "synced", "teacher_sync_steps": 1}
LIVE = {"teacher_model_kind": "live"}
TWO_GROUPS = (0, 0, 0, 0, 1, 0, 1, 0)
METHODS = {
    "SDPO": Run("SDPO", settings=EMA, steps=2),
    "RLSD": Run("RLSD", settings=SYNCED, steps=2),
    "SDZero": Run("SDZero", settings=SYNCED, steps=2),
    "RFT": Run("RFT", steps=2),
}
RUNS = {
    **METHODS,
    "SDPO, one process without tokens": Run("SDPO", TWO_GROUPS, EMA),
    "RFT, one process without tokens": Run("RFT", (0, 0, 1, 1)),
    "RLSD, advantages of the batch": Run("RLSD", TWO_GROUPS, {"scale_rewards": "batch"}),
    "SDPO, accumulated": Run("SDPO", TWO_GROUPS, {**EMA, "gradient_accumulation_steps": 2}),
    "SDPO, no signal at all": Run(
        "SDPO", (0, 0, 0, 0), {**EMA, "include_environment_feedback": False}
    ),
    "SDPO, mean of each process": Run("SDPO", settings={**EMA, "loss_type": "bnpo"}),
    "SDPO, gradient broken": Run("SDPO", settings=EMA, broken=1),
    "SDPO, credit maps": Run("SDPO", settings={**EMA, "credit_map_steps": 1}, steps=2),
    "SDPO, resumed": Run("SDPO", settings=EMA, steps=2, resumed=True),
    "SDPO, LoRA": Run("SDPO", settings=EMA, steps=2, adapter=True),
    **{
        f"{name}, FSDP2": Run(run.method, run.success, run.settings, run.steps, fsdp=2)
        for name, run in METHODS.items()
    },
    "RFT, one process without tokens, FSDP2": Run("RFT", (0, 0, 1, 1), fsdp=2),
    "SDPO, gradient broken, FSDP2": Run("SDPO", settings=EMA, broken=1, fsdp=2),
    "SDPO, resumed, FSDP2": Run("SDPO", settings=EMA, steps=2, resumed=True, fsdp=2),
    "SDPO, LoRA, FSDP2": Run("SDPO", settings=EMA, steps=2, adapter=True, fsdp=2),
    "SDPO, trust region, FSDP2": Run(
        "SDPO", settings={"teacher_model_kind": "trust_region"}, steps=2, fsdp=2
    ),
    "SDPO, live, FSDP1": Run("SDPO", settings=LIVE, steps=2, fsdp=1, dtype=torch.float32),
    "SDPO, FSDP1": Run("SDPO", settings=EMA, fsdp=1),
}


def completion(row: int, is_good: int) -> list[int]:
    """Tokens of a row's completion; rows differ in length, and so do processes."""
    return [GOOD if is_good else BAD, *(50 + (7 * row + n) % 90 for n in range(1 + row % 5)), END]


def rewards(completion_ids: list[list[int]], **_: Any) -> list[float]:
    return [float(ids[0] == GOOD) for ids in completion_ids]


class Break(TrainerCallback):
    """Puts a NaN into one process's gradient, before DeepSpeed takes it or when all is done."""

    def __init__(self, rank: int | None) -> None:
        self.rank = rank

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if args.deepspeed and args.process_index == self.rank:
            trained = next(p for p in kwargs["model"].parameters() if p.requires_grad)
            trained.register_hook(lambda gradient: gradient * torch.nan)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if args.process_index == self.rank and not args.deepspeed:
            gradient = next(p.grad for p in kwargs["model"].parameters() if p.grad is not None)
            getattr(gradient, "_local_tensor", gradient).flatten()[0] = torch.nan


def shard_on_cpu(state: AcceleratorState, version: int) -> None:
    """Accelerate takes FSDP for GPUs alone; nothing in it needs one."""
    from accelerate import FullyShardedDataParallelPlugin

    state.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP
    state.fsdp_plugin = FullyShardedDataParallelPlugin(
        fsdp_version=version,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["Qwen3DecoderLayer"],
        state_dict_type="FULL_STATE_DICT",
    )


def train(run: Run, folder: pathlib.Path, num_processes: int) -> dict[str, Any]:
    """What is left of a run."""
    settings = {**ONE_STEP, **run.settings, "max_steps": run.steps, "shuffle_dataset": False}
    accumulate = settings.get("gradient_accumulation_steps", 1)
    size = len(run.success) // (num_processes * accumulate)
    if settings["loss_type"] == "bnpo":  # a mean over micro-batches: on one process or on two
        size, accumulate = len(run.success) // 2, 2 // num_processes
    settings.update(per_device_train_batch_size=size, gradient_accumulation_steps=accumulate)
    if run.resumed:
        # FSDP2 loads no state of an optimiser that has none
        adam = {"optim": "adamw_torch", "learning_rate": 1e-2}
        settings.update(save_strategy="steps", save_steps=1, **adam)
    rank = int(os.environ.get("RANK", "0"))

    def scripted(self: Any, prompt_ids: list[list[int]], *_: Any) -> tuple[Any, None]:
        first = rank * len(prompt_ids)
        rows = range(first, first + len(prompt_ids))
        return [completion(row, run.success[row % len(run.success)]) for row in rows], None

    build = functools.partial(_build, run, folder, settings)
    with (
        mock.patch.object(StockGRPOTrainer, "_generate_single_turn", scripted),
        mock.patch.object(grpo_trainer, "shuffle_sequence_dict", lambda batch: batch),
        mock.patch.object(Qwen3RotaryEmbedding, "forward", exact_rotary),
        # FSDP1 compares the device "cpu" with accelerate's "cpu:0"
        mock.patch.object(fsdp1, "_get_compute_device", return_value=torch.device("cpu")),
    ):
        trainer = build()
        trainer.train()
        found = remains(trainer)
        if run.resumed:
            again = build()
            again.train(resume_from_checkpoint=str(folder / "checkpoint-1"))
            found["resumed"] = remains(again)
    return found


def exact_rotary(
    self: Any, states: torch.Tensor, position_ids: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """In float64: rows are padded differently where others are beside them."""
    angles = position_ids[..., None].double() * self.inv_freq.double()
    angles = torch.cat([angles, angles], -1)
    return angles.cos().to(states.dtype), angles.sin().to(states.dtype)


def _build(run: Run, folder: pathlib.Path, settings: dict[str, Any]) -> Any:
    torch.manual_seed(3)
    AcceleratorState._reset_state()
    prepare = AcceleratorState.__init__

    def sharding(self: AcceleratorState, *args: Any, **kwargs: Any) -> None:
        prepare(self, *args, **kwargs)
        if run.fsdp:
            shard_on_cpu(self, run.fsdp)

    own = {"feedback_func": None, "reward_funcs": rewards, "num_generations": GROUP}
    with mock.patch.object(AcceleratorState, "__init__", sharding):
        trainer = make(
            run.method,
            folder,
            student=str(folder.parent / "model") if run.from_path else model(run.dtype),
            data=DATA,
            peft_config=peft.LoraConfig(**LORA) if run.adapter else None,
            **{**own, **settings},
        )
    trainer.callback_handler.callbacks.insert(0, Break(run.broken))
    return trainer


def remains(trainer: Any) -> dict[str, Any]:
    """Weights, teacher, the last batch's rows, and what was logged."""
    length = [batch["completion_ids"].size(1) for batch in trainer._buffered_inputs]
    batches = trainer._buffered_inputs
    contexts = [
        ids[: -length[n]][mask[: -length[n]].bool()].tolist()
        for n, batch in enumerate(batches)
        if trainer.has_teacher
        for ids, mask in zip(batch["teacher_input_ids"], batch["teacher_attention_mask"])
    ]
    teacher: dict[str, torch.Tensor] = {}
    if trainer.teacher is not None:
        teacher = {name: whole(value) for name, value in trainer.teacher._weights()[1].items()}
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    return {
        "weights": {
            name.removeprefix("module."): whole(value)
            for name, value in trainer.model.named_parameters()
            if value.requires_grad
        },
        "teacher": teacher,
        "age": None if trainer.teacher is None else trainer.teacher.age,
        "skipped": trainer._teacher_callback.num_skipped,
        "contexts": contexts,
        "advantages": torch.cat([batch["advantages"] for batch in batches]),
        "signal": torch.cat([batch["self_distillation_mask"] for batch in batches]),
        "logs": [
            {name: value for name, value in entry.items() if is_compared(name)} for entry in logs
        ],
    }


def is_compared(name: str) -> bool:
    """Whether a logged number has to be the same however many processes there are."""
    return name in ("loss", "grad_norm") or name.startswith(("self_distillation/", "reward"))


def whole(tensor: torch.Tensor) -> torch.Tensor:
    if hasattr(tensor, "ds_id"):
        import deepspeed

        with deepspeed.zero.GatheredParameters([tensor]):
            return tensor.detach().clone()
    full: Any = tensor.detach()
    return (full.full_tensor() if hasattr(full, "full_tensor") else full).clone()


def main(rank: int, port: int, folder: str, names: tuple[str, ...]) -> None:
    """Train each run, and save what is left of it or the error."""
    import traceback

    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), WORLD_SIZE="2")
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), ACCELERATE_USE_CPU="true")
    for number, name in enumerate(names):
        try:
            found = train(RUNS[name], pathlib.Path(folder, f"run{number}"), 2)
        except Exception:
            found = {"error": traceback.format_exc()}
        torch.save(found, f"{folder}/{number}-{rank}.pt")
