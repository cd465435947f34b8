"""SDFT: forward KL to a moving average of the model that has seen a demonstration."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor

from fused_sd import LMHead, LossOutput, sdft_loss, skip_first_tokens
from fused_sd.checks import check_non_negative
from fused_sd.integrations.shared.prompts import check_template
from fused_sd.integrations.shared.rollouts import Rollout
from fused_sd.integrations.trl.config import (
    POLICY_SETTINGS,
    SIBLING_SETTINGS,
    SelfDistillationConfig,
)
from fused_sd.integrations.trl.contexts import PrivilegedPrompt
from fused_sd.integrations.trl.divergence_trainer import DivergenceTrainer
from fused_sd.integrations.trl.trainer import Run


@dataclass
class SDFTConfig(SelfDistillationConfig):
    """SDFT's settings; defaults are the official code's (arXiv 2601.19897).

    TRL's SDFTConfig: ``distillation_alpha=0.5, distillation_topk=100, teacher_model_kind="base",
    num_loss_tokens_to_skip=0``.  The official code's correction for the inference engine's
    log-probabilities is not made: TRL's rollouts do not keep them.
    """

    unread: ClassVar[tuple[str, ...]] = (
        *SelfDistillationConfig.unread,
        *SIBLING_SETTINGS,
        *POLICY_SETTINGS,
        "distillation_mode",
        "distillation_is_clip",
        "distillation_add_tail",
        "distillation_weight",
        "success_reward_threshold",
    )

    reprompt_template: str = field(
        default="{prompt}\nThis is an example for a response to the question:\n{privileged}\nNow "
        "answer with a response of your own, including the thinking process:",
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
    loss_type: str = field(default="grpo", metadata={"help": "Average of the token losses."})
    num_generations: int = field(default=1, metadata={"help": "Completions of a prompt."})
    scale_rewards: str = field(default="none", metadata={"help": "SDFT reads no advantage."})
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
    """SDFT (arXiv 2601.19897); the dataset's ``privileged_context`` is the demonstration."""

    config_cls = SDFTConfig
    _name = "SDFT"
    needs_rewards = False
    needs_privileged = True

    def more_inputs(self, rollouts: Sequence[Rollout], output: dict[str, Any]) -> dict[str, Tensor]:
        mask, skipped = output["completion_mask"], self.args.num_loss_tokens_to_skip
        return {"loss_mask": skip_first_tokens(mask, skipped)}

    def divergence(
        self,
        student: tuple[Tensor, LMHead],
        teacher: tuple[Tensor, LMHead],
        inputs: dict[str, Any],
        run: Run,
    ) -> LossOutput:
        return sdft_loss(
            *student,
            *teacher,
            alpha=self.args.distillation_alpha,
            top_k=self.args.distillation_topk,
            **run,
        )
