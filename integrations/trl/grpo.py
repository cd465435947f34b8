"""GRPO on the same rollouts: the baseline, and what RLSD and RLCSD reshape.

Dimension key:  B sequences, T completion tokens, D hidden size
"""

from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor

from fused_sd import LMHead, LossOutput, grpo_loss
from fused_sd.checks import fail
from fused_sd.integrations.shared.rollouts import Rollout
from fused_sd.integrations.trl.config import (
    DIVERGENCE_SETTINGS,
    SIBLING_SETTINGS,
    TEACHER_SETTINGS,
    SelfDistillationConfig,
)
from fused_sd.integrations.trl.trainer import Run, SelfDistillationTrainer

PROMPTING_SETTINGS = ("reprompt_template", "max_reprompt_len")


@dataclass
class PolicyConfig(SelfDistillationConfig):
    """What the clipped policy surrogates have in common."""

    unread: ClassVar[tuple[str, ...]] = (
        *SelfDistillationConfig.unread,
        *DIVERGENCE_SETTINGS,
        *SIBLING_SETTINGS,
    )

    loss_type: str = field(default="dapo", metadata={"help": "Average of the token losses."})
    epsilon_high: float | None = field(
        default=0.28, metadata={"help": "Upper clip of the policy ratio; `epsilon` is the lower."}
    )
    dual_clip: float | None = field(
        default=3.0,
        metadata={"help": "Bound of the ratio where the advantage is negative; None for none."},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.teacher_model_kind == "trust_region":
            fail(
                "teacher_model_kind",
                "hold weights that score tokens, where no divergence mixes the student in",
                "'trust_region'",
                'pass "base", "ema" or "synced"',
            )


@dataclass
class GRPOConfig(PolicyConfig):
    """GRPO as in the baselines of SDPO and RLSD: clip (0.2, 0.28), dual clip 3, no KL."""

    unread: ClassVar[tuple[str, ...]] = (
        *PolicyConfig.unread,
        *TEACHER_SETTINGS,
        *PROMPTING_SETTINGS,
        "success_reward_threshold",
        "credit_map_steps",
    )


class PolicyTrainer(SelfDistillationTrainer):
    """Shared by the methods whose loss is a clipped policy surrogate."""

    metrics: ClassVar[tuple[str, ...]] = ("entropy", "ratio", "ratio_clip_fraction")

    def surrogate_settings(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Keywords of ``policy_loss`` that the configuration and the batch decide."""
        return {
            "old_log_probs": inputs.get("old_per_token_logps"),
            "ratio_clip": (self.args.epsilon, self.args.epsilon_high),
            "dual_clip": self.args.dual_clip,
        }

    def token_advantages(self, inputs: dict[str, Any]) -> Tensor:
        """Each sequence's advantage at its tokens, (B, T)."""
        return inputs["advantages"][:, None].expand(inputs["completion_ids"].shape)


class GRPOTrainer(PolicyTrainer):
    """GRPO (arXiv 2402.03300) from hidden states, on the rollouts that the other methods have."""

    config_cls = GRPOConfig
    _name = "GRPO"
    has_teacher = False

    def teacher_prompts(self, rollout: Rollout) -> list[int] | None:
        return rollout.prompt_ids  # no teacher reads it: every rollout counts

    def score_teacher(self, inputs: dict[str, Any]) -> None:
        return None

    def method_loss(
        self, hidden: Tensor, head: LMHead, teacher: None, inputs: dict[str, Any], run: Run
    ) -> LossOutput:
        return grpo_loss(
            hidden,
            head,
            inputs["completion_ids"],
            self.token_advantages(inputs),
            **self.surrogate_settings(inputs),
            **run,
        )
