"""RFT, rejection-sampling fine-tuning: cross entropy on the model's own correct completions."""

from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor

from fused_sd import LMHead, LossOutput, cross_entropy_loss
from fused_sd.integrations.shared.rollouts import Rollout
from fused_sd.integrations.trl.config import POLICY_SETTINGS, SelfDistillationConfig
from fused_sd.integrations.trl.trainer import Inputs, Options, SelfDistillationTrainer


@dataclass
class RFTConfig(SelfDistillationConfig):
    """RFT's settings.  Completions count whose reward reaches ``success_reward_threshold``.

    There is no official code; learning rate and lengths are TRL's.

    Examples:
        >>> from fused_sd.integrations.trl import RFTConfig
        >>> RFTConfig("out", success_reward_threshold=0.5).loss_type
        'dapo'
    """

    unread: ClassVar[tuple[str, ...]] = (
        *SelfDistillationConfig.unread,
        *POLICY_SETTINGS,
    )

    success_reward_threshold: float = field(
        default=1.0, metadata={"help": "Reward from which on a completion is learned from."}
    )
    scale_rewards: str = field(default="none", metadata={"help": "RFT reads no advantage."})


class RFTTrainer(SelfDistillationTrainer):
    """Cross entropy on correct rollouts, which are sampled during training.

    Examples:
        >>> from fused_sd.integrations.examples.arithmetic import questions, reward
        >>> from fused_sd.integrations.trl import RFTConfig, RFTTrainer
        >>> model = "Qwen/Qwen2.5-0.5B-Instruct"
        >>> trainer = RFTTrainer(model, reward, RFTConfig("out"), questions(64))
        >>> trainer.train()  # doctest: +SKIP
    """

    config_cls = RFTConfig
    _name = "RFT"
    has_teacher = False

    def teacher_prompts(self, rollout: Rollout) -> list[int] | None:
        # No teacher reads the prompt: None gives a wrong rollout weight 0.
        is_correct = rollout.reward >= self.args.success_reward_threshold
        return rollout.prompt_ids if is_correct else None

    def score_teacher(self, inputs: Inputs) -> None:
        return None

    def method_loss(
        self, hidden: Tensor, head: LMHead, teacher: None, inputs: Inputs, options: Options
    ) -> LossOutput:
        return cross_entropy_loss(hidden, head, inputs["completion_ids"], **options)
