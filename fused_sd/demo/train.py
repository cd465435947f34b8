"""Train with TRL's SDPO trainer, and measure before, during and after.

The student is the model with a LoRA adapter and reads the bare prompt.  The teacher is the same
model with the adapter switched off and reads worked examples before the prompt.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from fused_sd.demo import task
from fused_sd.demo.probe import Probe

TrainerKind = Literal["fused", "stock"]


@dataclass(frozen=True)
class Settings:
    """Hold everything that decides a run; the report prints all of it."""

    steps: int = 60
    learning_rate: float = 1e-3
    lora_rank: int = 16
    prompts_per_step: int = 8
    generations_per_prompt: int = 2
    max_completion_length: int = 2  # tokens sampled in training; nearly every plural fits
    max_answer_length: int = 5  # tokens of an answer to a held-out word
    distillation_alpha: float = 0.0  # TRL's name for the direction: 0 is KL(teacher || student)
    num_examples: int = 4
    num_held_out: int = 60
    probe_every: int = 10
    seed: int = 0
    trainer: TrainerKind = "fused"
    device: str = "cpu"


@dataclass
class Run:
    """Hold what one run measured."""

    settings: Settings
    curves: dict[str, list[tuple[int, float]]] = field(default_factory=dict)  # (step, value) points
    examples: list[dict[str, str]] = field(default_factory=list)  # held-out words and answers
    credit: list[dict[str, Any]] = field(default_factory=list)  # compared words and their rows
    training_seconds: float = 0.0

    def add(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self.curves.setdefault(name, []).append((step, value))

    def first(self, name: str) -> float:
        return self.curves[name][0][1]

    def last(self, name: str) -> float:
        return self.curves[name][-1][1]


def trainer_class(kind: TrainerKind) -> Any:
    """Return TRL's own trainer, or this library's, which never holds the logits."""
    if kind == "stock":
        from trl.experimental.sdpo import SDPOTrainer

        return SDPOTrainer
    from fused_sd.integrations.trl import FusedSDPOTrainer

    return FusedSDPOTrainer


def build_trainer(
    model: Any,
    tokenizer: Any,
    split: task.Split,
    settings: Settings,
    output_directory: Path,
    callbacks: list[Any] | None = None,
    activation_checkpointing: bool = False,
) -> Any:
    """Build an SDPO trainer for the task.

    TRL builds the teacher's prompt: it puts a row's ``privileged_context``, here the worked
    examples, before the bare prompt.
    """
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import PrinterCallback
    from trl.experimental.sdpo import SDPOConfig

    batch_size = settings.prompts_per_step * settings.generations_per_prompt
    arguments = SDPOConfig(
        output_dir=str(output_directory),
        max_steps=settings.steps,
        learning_rate=settings.learning_rate,
        lr_scheduler_type="linear",
        warmup_steps=4,
        per_device_train_batch_size=batch_size,
        num_generations=settings.generations_per_prompt,
        max_completion_length=settings.max_completion_length,
        distillation_mode="full_logits",
        distillation_alpha=settings.distillation_alpha,
        teacher_model_kind="base",
        include_environment_feedback=True,
        use_successful_as_teacher=False,
        feedback_template="{feedback_raw}",
        reprompt_template="{feedback}{prompt}",
        gradient_checkpointing=activation_checkpointing,
        use_cpu=settings.device == "cpu",
        bf16=False,
        seed=settings.seed,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        diagnostics_warning_interval=0,
    )
    adapter = LoraConfig(
        r=settings.lora_rank,
        lora_alpha=2 * settings.lora_rank,
        lora_dropout=0.0,
        target_modules="all-linear",  # every linear layer but the head
    )
    rows = task.training_rows(split, settings.seed, settings.num_examples)
    trainer = trainer_class(settings.trainer)(
        model=model,
        reward_funcs=task.reward,
        args=arguments,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        callbacks=callbacks or [],
        peft_config=adapter,
    )
    trainer.remove_callback(PrinterCallback)  # it would print into the progress bar
    return trainer


def train(
    directory: Path,
    output_directory: Path,
    settings: Settings,
    progress: Callable[[int, Run], None] = lambda step, run: None,
    build: Callable[..., Any] = build_trainer,
) -> Run:
    """Train once and measure before, during and after.

    Args:
        directory: the folder of the converted model.
        output_directory: a folder that TRL may write to.
        settings: the settings of the run.
        progress: called with the step and the run after every measured or logged step.
        build: makes the trainer from the arguments of ``build_trainer``.
    """
    from transformers import TrainerCallback

    from fused_sd.demo.model import load

    model, tokenizer = load(directory, settings.device)
    split = task.split_words(settings.num_held_out)
    probe = Probe(tokenizer, split, settings.num_examples, settings.max_answer_length)
    run = Run(settings)

    class Collector(TrainerCallback):
        """Add TRL's logs and the measurements to the run."""

        def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            run.add(state.global_step, _training_values(kwargs["logs"]))
            progress(state.global_step, run)

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            step = state.global_step
            if step % settings.probe_every == 0 and step < settings.steps:
                run.add(step, probe.look(trainer.model).values)
                progress(step, run)

    trainer = build(model, tokenizer, split, settings, output_directory, [Collector()])

    teacher_answers = probe.teacher_answers(trainer.model)
    before = probe.look(trainer.model)
    run.add(0, {"teacher accuracy": probe.accuracy(teacher_answers)} | before.values)
    progress(0, run)

    training_started = time.perf_counter()
    trainer.train()
    run.training_seconds = time.perf_counter() - training_started

    after = probe.look(trainer.model)
    run.add(settings.steps, after.values)
    run.examples = [
        {"word": word, "before": old, "after": new, "teacher": shown}
        for word, old, new, shown in zip(
            probe.words, before.answers, after.answers, teacher_answers
        )
    ]
    run.credit = [
        {"word": word, "before": old, "after": new}
        for word, old, new in zip(probe.words, before.credit, after.credit)
    ]
    progress(settings.steps, run)
    return run


def _training_values(logs: dict[str, Any]) -> dict[str, float]:
    """Return the curves' values from TRL's log of a step."""
    names = {
        "self_distillation/distillation_loss": "training loss",
        "self_distillation/reward_mean": "training reward",
    }
    return {name: float(logs[key]) for key, name in names.items() if key in logs}
