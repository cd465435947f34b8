"""The trainers of all providers, each built as its users build it.

Every teacher is the student itself in a longer context (TRL's ``teacher_model_kind="live"``), so
that every trainer holds one set of weights.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from datasets import Dataset
from trl import DistillationConfig, DistillationTrainer
from trl.experimental.sdpo import SDPOConfig, SDPOTrainer

from benchmarks.step.providers import JSD, TOP_K
from fused_sd.integrations.trl import FusedSDPOTrainer

Mode = Literal["topk_logits", "full_logits", "sampled_token"]


class Setup(NamedTuple):
    """The model, tokenizer and settings that every trainer is built from."""

    model: Any
    tokenizer: Any
    folder: Path
    device: str
    dtype: torch.dtype

    @property
    def arguments(self) -> dict[str, Any]:
        """Arguments beside TRL's defaults (activation checkpointing, AdamW): nothing is written."""
        return {
            "output_dir": str(self.folder),
            "max_steps": 10**6,  # the schedule ends training
            "learning_rate": 1e-6,
            "lr_scheduler_type": "constant",
            "per_device_train_batch_size": 2,  # rows of the data set, which the loop replaces
            "save_strategy": "no",
            "logging_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
            "use_cpu": self.device == "cpu",
            "bf16": self.dtype == torch.bfloat16,
        }

    def data(self, **columns: str) -> Any:
        return Dataset.from_dict({name: [text] * 64 for name, text in columns.items()})


class TeacherContextDistillation(DistillationTrainer):
    """TRL's trainer with SDPO's teacher context.

    TRL's own teacher reads the student's tokens; here it reads the feedback before them, as SDPO's
    teacher does, so that all trainers run the same forward passes.
    """

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        self.teacher_inputs = inputs["teacher_input_ids"], inputs["teacher_attention_mask"]
        return super().compute_loss(model, inputs, *args, **kwargs)

    def _get_last_hidden_state(
        self, model: Any, input_ids: Any, attention_mask: Any, *args: Any, **kwargs: Any
    ) -> Any:
        if not torch.is_grad_enabled():  # TRL calls this for the teacher, too
            input_ids, attention_mask = self.teacher_inputs
        return super()._get_last_hidden_state(model, input_ids, attention_mask, *args, **kwargs)


def _rewards(prompts: list[Any], **_: Any) -> list[float]:
    return [0.0] * len(prompts)


def _sdpo(cls: Any, mode: Mode, alpha: float) -> Callable[[Setup], Any]:
    def build(setup: Setup) -> Any:
        arguments = SDPOConfig(
            **setup.arguments,
            num_generations=2,
            teacher_model_kind="live",
            distillation_mode=mode,
            distillation_alpha=alpha,
            distillation_topk=TOP_K if mode == "topk_logits" else None,
            distillation_add_tail=True,
        )
        trainer = cls(
            setup.model,
            reward_funcs=_rewards,
            args=arguments,
            train_dataset=setup.data(prompt="x", privileged_context="x"),
            processing_class=setup.tokenizer,
        )
        assert getattr(trainer, "_fused", True)
        return trainer

    return build


def _distillation(setup: Setup) -> Any:
    return TeacherContextDistillation(
        setup.model,
        teacher_model=setup.model,
        args=DistillationConfig(**setup.arguments, beta=JSD, temperature=1.0),
        train_dataset=setup.data(prompt="x"),
        processing_class=setup.tokenizer,
    )


# by the provider's name
BUILDERS: dict[str, Callable[[Setup], Any]] = {
    "trl-topk": _sdpo(SDPOTrainer, "topk_logits", JSD),
    "fused-topk": _sdpo(FusedSDPOTrainer, "topk_logits", JSD),
    "trl-full": _sdpo(SDPOTrainer, "full_logits", JSD),
    "trl-distillation": _distillation,
    "fused-full": _sdpo(FusedSDPOTrainer, "full_logits", JSD),
    "trl-sampled": _sdpo(SDPOTrainer, "sampled_token", 1.0),
    "fused-sampled": _sdpo(FusedSDPOTrainer, "sampled_token", 1.0),
}
