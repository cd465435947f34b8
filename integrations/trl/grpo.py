"""GRPO on the rollouts of the other methods, and what RLSD and RLCSD share with it.

Dimension key:  B sequences, T completion tokens, D hidden size
"""

from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor

from fused_sd import LMHead, LossOutput, grpo_loss
from fused_sd.integrations.shared.rollouts import Rollout
from fused_sd.integrations.trl.config import SelfDistillationConfig
from fused_sd.integrations.trl.trainer import Inputs, Options, SelfDistillationTrainer


@dataclass
class PolicyConfig(SelfDistillationConfig):
    """Settings that the methods with a clipped policy loss share."""

    epsilon_high: float | None = field(
        default=0.28, metadata={"help": "Upper clip of the policy ratio; `epsilon` is the lower."}
    )
    delta: float | None = field(
        default=3.0,
        metadata={
            "help": "Cap of the ratio where the advantage is negative (dual clip); None: no cap."
        },
    )


@dataclass
class GRPOConfig(PolicyConfig):
    """GRPO's settings; defaults are RLSD's baseline's: clip (0.2, 0.28), dual clip 3, no KL.

    For SDPO's baseline pass ``scale_rewards="none", max_completion_length=8192,
    vllm_importance_sampling_mode="token_truncate", vllm_importance_sampling_clip_max=2.0``.
    ``FusedGRPOTrainer`` has all of TRL's settings and TRL's defaults.

    Examples:
        >>> from fused_sd.integrations.trl import GRPOConfig
        >>> args = GRPOConfig("out")
        >>> args.epsilon, args.epsilon_high, args.delta, args.beta
        (0.2, 0.28, 3.0, 0.0)
    """

    max_completion_length: int | None = field(
        default=4096, metadata={"help": "Tokens to sample at most."}
    )


class PolicyTrainer(SelfDistillationTrainer):
    """Base of the methods whose loss is a clipped policy surrogate."""

    metrics: ClassVar[tuple[str, ...]] = (
        "student_entropy",
        "importance_ratio",
        "ratio_clip_fraction",
    )

    def surrogate_settings(self, inputs: Inputs) -> dict[str, Any]:
        """Return the keywords of ``policy_loss`` that configuration and batch decide."""
        return {
            "old_log_probs": inputs.get("old_per_token_logps"),
            "ratio_clip": (self.epsilon_low, self.epsilon_high),
            "dual_clip": self.args.delta,
        }


class GRPOTrainer(PolicyTrainer):
    """GRPO (arXiv 2402.03300) from hidden states, on the rollouts of the other methods.

    Examples:
        >>> from fused_sd.integrations.examples.arithmetic import questions, reward
        >>> from fused_sd.integrations.trl import GRPOConfig, GRPOTrainer
        >>> model = "Qwen/Qwen2.5-0.5B-Instruct"
        >>> args = GRPOConfig("out", scale_rewards="none")
        >>> trainer = GRPOTrainer(model, reward, args, questions(64))
        >>> trainer.train()  # doctest: +SKIP
    """

    config_cls = GRPOConfig
    _name = "GRPO"
    has_teacher = False

    def teacher_prompts(self, rollout: Rollout) -> list[int] | None:
        return rollout.prompt_ids  # no teacher reads them; None would give the rollout weight 0

    def score_teacher(self, inputs: Inputs) -> None:
        return None

    def method_loss(
        self, hidden: Tensor, head: LMHead, teacher: None, inputs: Inputs, options: Options
    ) -> LossOutput:
        return grpo_loss(
            hidden,
            head,
            inputs["completion_ids"],
            self.token_advantages(inputs),
            **self.surrogate_settings(inputs),
            **options,
        )
