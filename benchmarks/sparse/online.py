"""The demo's task, on-policy: one seed's learning curves with a dense or a sparse gradient.

Questions, feedback, adapter, direction of the KL and measurements are the demo's.  Sampling and
loss use temperature 0.6.  At 1 the model, which was never trained to continue ``cat ->``, is so
uncertain that no row of its gradient is sparse, and there is nothing to compare.
"""

import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.sparse.arms import Arm, step_record
from fused_sd.demo import task
from fused_sd.demo.train import Run, Settings, train

TEMPERATURE = 0.6
CURVES = ("held-out accuracy", "held-out KL", "held-out entropy")
SETTINGS = Settings(steps=40, prompts_per_step=4, generations_per_prompt=2)


@dataclass(frozen=True)
class Part:
    """One run.

    Attributes:
        arm: The form of the gradient.
        seed: The seed of the data's order, the adapter and the sampling.
        settings: The demo's settings; their seed and device are not read.
        device: "cpu" or "cuda".
    """

    arm: Arm
    seed: int
    settings: Settings = SETTINGS
    device: str = "cpu"

    @property
    def name(self) -> str:
        return f"online-{self.arm.name}-{self.seed}-{self.settings.steps}-{self.device}"

    @property
    def decided_by(self) -> dict[str, Any]:
        """Every setting that decides the run's results."""
        return {**asdict(self), "temperature": TEMPERATURE}


def run(part: Part, directory: Path) -> dict[str, Any]:
    """Train once.

    Returns:
        ``curves``, which maps a name to (step, value) points of the held-out words, and ``steps``,
        one ``step_record`` for each step.
    """
    settings = Settings(**{**asdict(part.settings), "seed": part.seed, "device": part.device})
    steps: list[dict[str, float]] = []

    def build(*arguments: Any) -> Any:
        return build_trainer(part.arm, steps, *arguments)

    with tempfile.TemporaryDirectory() as output:
        found: Run = train(directory, Path(output), settings, build=build)
    return {"curves": {name: found.curves[name] for name in CURVES}, "steps": steps}


def build_trainer(
    arm: Arm,
    steps: list[dict[str, float]],
    model: Any,
    tokenizer: Any,
    split: task.Split,
    settings: Settings,
    output_directory: Path,
    callbacks: list[Any],
) -> Any:
    """Build the demo's trainer from this library's own class, which supports sparse gradients."""
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import PrinterCallback

    from fused_sd.integrations.trl import SDPOConfig, SDPOTrainer

    class Trainer(SDPOTrainer):
        """Records every step's loss and certificate."""

        def method_loss(self, *arguments: Any) -> Any:
            output = super().method_loss(*arguments)
            steps.append(step_record(output))
            return output

    arguments = SDPOConfig(
        output_dir=str(output_directory),
        max_steps=settings.steps,
        learning_rate=settings.learning_rate,
        lr_scheduler_type="linear",
        warmup_steps=4,
        weight_decay=0.0,
        per_device_train_batch_size=settings.prompts_per_step * settings.generations_per_prompt,
        num_generations=settings.generations_per_prompt,
        max_completion_length=settings.max_completion_length,
        temperature=TEMPERATURE,
        gradient=arm.loss_options["gradient"],
        gradient_tolerance=arm.tolerance,
        distillation_mode="full_logits",
        distillation_alpha=settings.distillation_alpha,
        teacher_model_kind="base",
        use_successful_as_teacher=False,
        feedback_template="{feedback_raw}",
        reprompt_template="{solution}{feedback}{prompt}",
        use_cpu=settings.device == "cpu",
        bf16=False,
        seed=settings.seed,
        logging_steps=settings.steps,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    adapter = LoraConfig(
        r=settings.lora_rank,
        lora_alpha=2 * settings.lora_rank,
        lora_dropout=0.0,
        target_modules="all-linear",
    )
    rows = task.training_rows(split, settings.seed, settings.num_examples)
    trainer = Trainer(
        model=model,
        reward_funcs=task.reward,
        args=arguments,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        callbacks=callbacks,
        peft_config=adapter,
    )
    trainer.remove_callback(PrinterCallback)
    return trainer
