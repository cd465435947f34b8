"""Training of one arm on one unit, by the trainer's public interface, with evaluations."""

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import PrinterCallback, TrainerCallback

from benchmarks.methods.arms import GROUP, Arm
from benchmarks.methods.evaluate import look
from benchmarks.methods.experiments import Scale
from benchmarks.methods.tasks import Task
from fused_sd.integrations import trl


def device() -> str:
    """Return "cuda" if there is a GPU, else "cpu"."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def load(task: Task, cache: Path) -> tuple[Any, Any]:
    """Return the base model in fp32 on the device, and its tokenizer or processor."""
    model, processor = task.load(cache)
    return model.to(device()), processor


def common_settings(seed: int, output: str) -> dict[str, Any]:
    """Return the settings that every trainer of the experiments has."""
    return {
        "output_dir": output,
        "weight_decay": 0.0,
        "activation_checkpointing": False,
        "use_cpu": device() == "cpu",
        "bf16": False,
        "seed": seed,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }


def build(
    task: Task, arm: Arm, model: Any, processor: Any, *, rate: float, scale: Scale, **common: Any
) -> Any:
    """Build the arm's trainer as a user would; ``common`` is that of ``common_settings``."""
    config = getattr(trl, arm.config)(
        max_steps=scale.steps,
        learning_rate=rate,
        lr_scheduler_type="constant_with_warmup",
        warmup_steps=5,
        per_device_train_batch_size=scale.generations,
        num_generations=GROUP,
        max_completion_length=task.max_response,
        temperature=1.0,
        top_p=1.0,
        top_k=0,
        observe=False,
        logging_steps=10,
        **common,
        **(task.templates[arm.template] if arm.template else {}),
        **arm.settings,
    )
    return getattr(trl, arm.trainer)(
        model=model,
        reward_funcs=task.reward,
        args=config,
        train_dataset=Dataset.from_list(task.rows(arm.hint)),
        processing_class=processor,
        peft_config=adapter(task),
        **({"feedback_func": task.said} if arm.hears else {}),
    )


def adapter(task: Task) -> Any:
    """Return the adapter that is trained; None: the whole model is trained."""
    if task.lora_rank is None:
        return None
    from peft import LoraConfig

    return LoraConfig(
        r=task.lora_rank,
        lora_alpha=2 * task.lora_rank,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )


class Curve(TrainerCallback):
    """Evaluates the student every few steps, and measures the time without the evaluations.

    Args:
        take: Evaluates the student.
        every: The steps between two evaluations.
        generations_per_step: The generations of a step.
        before: The generations that were spent before the training.
    """

    def __init__(
        self,
        take: Callable[[], dict[str, Any]],
        *,
        every: int,
        generations_per_step: int,
        before: int = 0,
    ) -> None:
        self.take, self.every = take, every
        self.per_step, self.before = generations_per_step, before
        self.looks: list[dict[str, Any]] = []
        self.looking = 0.0

    def look(self, step: int) -> None:
        """Evaluate after a step."""
        started = time.perf_counter()
        generations = self.before + step * self.per_step
        self.looks.append({"step": step, "generations": generations, **self.take()})
        self.looking += time.perf_counter() - started

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step % self.every == 0:
            self.look(state.global_step)


def train(trainer: Any, task: Task, part: str, scale: Scale, *, before: int = 0) -> dict[str, Any]:
    """Train once, and evaluate before, during and after.

    Args:
        trainer: The arm's trainer.
        task: The task.
        part: The part of its questions that is evaluated.
        scale: The size of the training.
        before: Generations that were spent before.

    Returns:
        ``curve``: evaluations, each with its step and the number of generations so far;
        ``seconds``: the time of training without the evaluations.
    """
    questions = task.questions[part][: scale.num_questions]
    curve = Curve(
        lambda: look(trainer.model, trainer.processing_class, task, questions),
        every=scale.look_every,
        generations_per_step=scale.generations,
        before=before,
    )
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(curve)
    curve.look(0)
    curve.looking, started = 0.0, time.perf_counter()
    trainer.train()
    if trainer.state.global_step % scale.look_every:
        curve.look(trainer.state.global_step)
    return {"curve": curve.looks, "seconds": time.perf_counter() - started - curve.looking}


def run(
    task: Task, arm: Arm, rate: float, seed: int, scale: Scale, cache: Path, *, part: str
) -> dict[str, Any]:
    """Train an arm from the base model; see ``train`` for what is returned."""
    model, processor = load(task, cache)
    with tempfile.TemporaryDirectory() as output:
        common = common_settings(seed, output)
        trainer = build(task, arm, model, processor, rate=rate, scale=scale, **common)
        return train(trainer, task, part, scale)
