"""Training of one method with one seed, by the trainer's public interface, with evaluations."""

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback, TrainerCallback

from benchmarks.methods.evaluate import look
from benchmarks.methods.settings import GROUP, LORA_RANK, METHODS, Scale, method_settings
from benchmarks.methods.task import Task
from fused_sd.integrations import trl


def load(task: Task, seed: int, cache: Path) -> tuple[Any, Any]:
    """Return the base model in fp32 and its tokenizer."""
    folder = task.base_model(seed, cache)
    if task.name == "smollm2":
        from fused_sd.demo import model as demo

        return demo.load(folder, device())
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model.to(device()), AutoTokenizer.from_pretrained(folder)


def device() -> str:
    """Return "cuda" if there is a GPU, else "cpu"."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def build(
    task: Task, method: str, rate: float, seed: int, scale: Scale, cache: Path, output: str
) -> Any:
    """Build the method's trainer as a user would."""
    settings = METHODS[method]
    model, tokenizer = load(task, seed, cache)
    config = getattr(trl, settings.config)(
        output_dir=output,
        max_steps=scale.steps,
        learning_rate=rate,
        lr_scheduler_type="constant_with_warmup",
        warmup_steps=5,
        weight_decay=0.0,
        per_device_train_batch_size=scale.generations,
        num_generations=GROUP,
        max_completion_length=task.max_response,
        temperature=1.0,
        top_p=1.0,
        top_k=0,
        observe=False,
        activation_checkpointing=False,
        use_cpu=device() == "cpu",
        bf16=False,
        seed=seed,
        logging_steps=10,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        **(task.templates[settings.template] if settings.template else {}),
        **method_settings(task.name, method),
    )
    adapter = None
    if task.name == "smollm2":
        from peft import LoraConfig

        adapter = LoraConfig(
            r=LORA_RANK,
            lora_alpha=2 * LORA_RANK,
            target_modules="all-linear",
            task_type="CAUSAL_LM",
        )
    return getattr(trl, settings.trainer)(
        model=model,
        reward_funcs=task.reward,
        args=config,
        train_dataset=Dataset.from_list(task.rows(settings.hint)),
        processing_class=tokenizer,
        peft_config=adapter,
    )


class Looks(TrainerCallback):
    """Evaluates the student every few steps."""

    def __init__(self, every: int, take: Callable[[int], dict[str, Any]]) -> None:
        self.every, self.take = every, take
        self.curve: list[dict[str, Any]] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step % self.every == 0:
            self.curve.append(self.take(state.global_step))


def run(
    task: Task,
    method: str,
    rate: float,
    seed: int,
    scale: Scale,
    cache: Path,
    *,
    part: str = "held_out",
) -> dict[str, Any]:
    """Train once, and evaluate before, during and after.

    Args:
        part: The part of the task's questions that is evaluated.

    Returns:
        ``curve``: evaluations, each with its step and the number of generations so far;
        ``seconds``: the time of training without the evaluations.
    """
    questions = task.questions[part][: scale.num_questions]
    started, looking = time.perf_counter(), 0.0

    with tempfile.TemporaryDirectory() as output:
        trainer = build(task, method, rate, seed, scale, cache, output)

        def take(step: int) -> dict[str, Any]:
            nonlocal looking
            begun = time.perf_counter()
            taken = look(trainer.model, trainer.processing_class, task, questions)
            looking += time.perf_counter() - begun
            return {"step": step, "generations": step * scale.generations, **taken}

        trainer.remove_callback(PrinterCallback)
        looks = Looks(scale.look_every, take)
        trainer.add_callback(looks)
        looks.curve.append(take(0))
        started, looking = time.perf_counter(), 0.0
        trainer.train()
    return {"curve": looks.curve, "seconds": time.perf_counter() - started - looking}
