"""SDFT: forward KL to a moving average of the model that has seen a demonstration."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from fused_sd import LossOutput, sdft_loss, skip_first_tokens
from fused_sd.checks import check_non_negative
from fused_sd.integrations.shared import templates
from fused_sd.integrations.shared.prompts import check_template
from fused_sd.integrations.shared.rollouts import Rollout
from fused_sd.integrations.trl.config import TokenCorrection
from fused_sd.integrations.trl.contexts import PrivilegedPrompt
from fused_sd.integrations.trl.divergence_trainer import (
    DivergenceConfig,
    DivergenceTrainer,
    StatesAndHead,
)
from fused_sd.integrations.trl.reduction import sequence_means
from fused_sd.integrations.trl.trainer import Inputs, Options


@dataclass
class SDFTConfig(TokenCorrection, DivergenceConfig):
    """SDFT's settings; defaults are the official code's (arXiv 2601.19897).

    For the loss of TRL's SDFTConfig pass ``distillation_alpha=0.5, distillation_topk=100,
    teacher_model_kind="base", num_loss_tokens_to_skip=0``.

    Examples:
        >>> from fused_sd.integrations.trl import SDFTConfig
        >>> SDFTConfig("out").num_loss_tokens_to_skip  # the first tokens of a response
        3
        >>> SDFTConfig("out", distillation_alpha=0.5, distillation_topk=100).teacher_update_rate
        0.01
    """

    learning_rate: float = field(default=5e-5, metadata={"help": "Peak learning rate."})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "Learning rate schedule."})
    warmup_steps: float = field(
        default=0.1, metadata={"help": "Warm-up, in steps or as a share of all."}
    )
    weight_decay: float = field(default=0.0, metadata={"help": "AdamW's weight decay."})
    max_completion_length: int | None = field(
        default=1024, metadata={"help": "Tokens to sample at most."}
    )
    reprompt_template: str = field(
        default=templates.SDFT,
        metadata={"help": "The teacher's last user turn, from {prompt} and {privileged}."},
    )
    distillation_alpha: float = field(
        default=0.0, metadata={"help": "0: KL(t||s), 1: KL(s||t), between: Jensen-Shannon."}
    )
    distillation_topk: int | None = field(
        default=None, metadata={"help": "The student's top-k, renormalised; None: all entries."}
    )
    num_loss_tokens_to_skip: int = field(
        default=3, metadata={"help": "Tokens at a completion's start that have no loss."}
    )
    sequence_mean_correction: bool = field(
        default=True,
        metadata={
            "help": "The mean of a sequence's ratios to vLLM multiplies its loss, as in the "
            "official code; False: each token has its own ratio."
        },
    )
    loss_type: str = field(default="grpo", metadata={"help": "Average of the token losses."})
    teacher_update_rate: float = field(
        default=0.01, metadata={"help": "Share of the student in the moving average."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_template("reprompt_template", self.reprompt_template, "prompt", "privileged")
        check_non_negative(
            "num_loss_tokens_to_skip", self.num_loss_tokens_to_skip, "pass 0 to skip none"
        )


class SDFTTrainer(PrivilegedPrompt, DivergenceTrainer):
    """SDFT (arXiv 2601.19897); the dataset's ``privileged_context`` is the demonstration.

    Examples:
        >>> from datasets import Dataset
        >>> from fused_sd.integrations.trl import SDFTConfig, SDFTTrainer
        >>> row = {"prompt": "Name a tool call for rain.", "privileged_context": "weather(place)"}
        >>> model, dataset = "Qwen/Qwen2.5-0.5B-Instruct", Dataset.from_list([row])
        >>> trainer = SDFTTrainer(model, args=SDFTConfig("out"), train_dataset=dataset)
        >>> trainer.train()  # doctest: +SKIP
    """

    config_cls = SDFTConfig
    _name = "SDFT"
    needs_rewards = False
    needs_privileged = True

    def more_inputs(self, rollouts: Sequence[Rollout], output: dict[str, Any]) -> dict[str, Tensor]:
        mask, skipped = output["loss_mask"], self.args.num_loss_tokens_to_skip
        return {"loss_mask": skip_first_tokens(mask, skipped)}

    def rollout_correction(self, inputs: Inputs) -> Tensor | None:
        ratio = super().rollout_correction(inputs)
        if ratio is None or not self.args.sequence_mean_correction:
            return ratio
        return sequence_means(ratio, inputs["loss_mask"])

    def divergence(
        self, student: StatesAndHead, teacher: StatesAndHead, inputs: Inputs, options: Options
    ) -> LossOutput:
        return sdft_loss(
            *student,
            *teacher,
            alpha=self.args.to_divergence(),
            top_k=self.args.distillation_topk,
            **options,
        )
