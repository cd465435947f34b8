"""SD-Zero's second phase: the reviser's distributions are distilled into the generator.

Dimension key:  B sequences, T completion tokens
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from fused_sd import LMHead, LossOutput, sd_zero_loss
from fused_sd.checks import check_one_of, check_unit_interval, fail
from fused_sd.integrations.shared.rollouts import Rollout
from fused_sd.integrations.shared.verdicts import CORRECT_PHRASE, DELIMITER, WRONG_PHRASE
from fused_sd.integrations.trl.config import (
    POLICY_SETTINGS,
    SIBLING_SETTINGS,
    SelfDistillationConfig,
)
from fused_sd.integrations.trl.divergence_trainer import DivergenceTrainer
from fused_sd.integrations.trl.trainer import Run


@dataclass
class SDZeroConfig(SelfDistillationConfig):
    """SD-Zero's settings; defaults are the official code's (arXiv 2604.12002).

    Iterative self-evolution, the teacher renewed at plateaus: ``teacher_model_kind="synced",
    teacher_sync_steps=400``.
    """

    unread: ClassVar[tuple[str, ...]] = (
        *SelfDistillationConfig.unread,
        *SIBLING_SETTINGS,
        *POLICY_SETTINGS,
        "reprompt_template",
        "distillation_mode",
        "distillation_alpha",
        "distillation_is_clip",
        "distillation_add_tail",
        "distillation_weight",
    )

    variant: str = field(
        default="code",
        metadata={
            "help": "`code`: mixed KL over the teacher's top-k, renormalised; `paper`: KL(s||t) "
            "over the vocabulary."
        },
    )
    forward_weight: float = field(
        default=0.5, metadata={"help": "Weight of KL(t||s) in the mixture of `code`."}
    )
    distillation_topk: int | None = field(
        default=64, metadata={"help": "Entries of the teacher's support in `code`."}
    )
    correct_phrase: str = field(
        default=CORRECT_PHRASE, metadata={"help": "What follows a response that was right."}
    )
    wrong_phrase: str = field(
        default=WRONG_PHRASE, metadata={"help": "What follows a response that was wrong."}
    )
    success_reward_threshold: float = field(
        default=0.5, metadata={"help": "A response is right where its reward is above this."}
    )
    max_reprompt_len: int = field(
        default=32768,
        metadata={
            "help": "Longest teacher sequence, both copies of the response included; longer "
            "responses are cut in both, and have loss up to the cut."
        },
    )
    loss_type: str = field(default="dapo", metadata={"help": "Average of the token losses."})
    num_generations: int = field(default=1, metadata={"help": "Completions of a prompt."})
    scale_rewards: str = field(default="none", metadata={"help": "SD-Zero reads no advantage."})
    teacher_model_kind: str = field(
        default="base", metadata={"help": "The reviser that phase 1 made, frozen."}
    )

    def __post_init__(self) -> None:
        if self.variant == "paper":
            for name in ("distillation_topk", "forward_weight"):
                if getattr(self, name) not in (None, getattr(type(self), name)):
                    rule, remedy = 'be left as it is for variant="paper"', 'pass variant="code"'
                    fail(name, rule, getattr(self, name), remedy)
            self.distillation_topk = None
        super().__post_init__()
        check_one_of("variant", self.variant, ("code", "paper"))
        check_unit_interval("forward_weight", self.forward_weight)


class SDZeroTrainer(DivergenceTrainer):
    """SD-Zero's phase 2 (arXiv 2604.12002).

    The teacher reads the prompt, the student's own response and a phrase that says whether it was
    right, and then scores the same response again.  Start from the model that ``SRTTrainer`` made.
    """

    config_cls = SDZeroConfig
    _name = "SD-Zero"

    def teacher_prompts(self, rollout: Rollout) -> list[int] | None:
        response, phrase = self._first_copy(rollout)
        if not response and rollout.completion_ids:
            return None  # prompt and phrase alone fill the teacher's length
        return [*rollout.prompt_ids, *response, *phrase]

    def more_inputs(self, rollouts: Sequence[Rollout], output: dict[str, Any]) -> dict[str, Tensor]:
        mask = output["completion_mask"]
        room = [self._room(rollout) for rollout in rollouts]
        columns = torch.arange(mask.size(1), device=mask.device)
        kept = columns < torch.tensor(room, device=mask.device)[:, None]
        return {"loss_mask": mask * kept}

    def divergence(
        self,
        student: tuple[Tensor, LMHead],
        teacher: tuple[Tensor, LMHead],
        inputs: dict[str, Any],
        run: Run,
    ) -> LossOutput:
        top_k = (
            {} if self.args.distillation_topk is None else {"top_k": self.args.distillation_topk}
        )
        return sd_zero_loss(
            *student,
            *teacher,
            variant=self.args.variant,
            forward_weight=self.args.forward_weight,
            **top_k,
            **run,
        )

    def _first_copy(self, rollout: Rollout) -> tuple[list[int], list[int]]:
        """The response without its end, and the verdict's phrase, as tokens."""
        ends = {*self.end_token_ids, self._tokenizer.pad_token_id}
        response = rollout.completion_ids[: self._room(rollout)]
        if response and response[-1] in ends:
            response = response[:-1]
        return response, self._phrase(rollout)

    def _phrase(self, rollout: Rollout) -> list[int]:
        is_correct = rollout.reward > self.args.success_reward_threshold
        text = self.args.correct_phrase if is_correct else self.args.wrong_phrase
        return self._tokenizer(f"{DELIMITER}{text}{DELIMITER}", add_special_tokens=False)[
            "input_ids"
        ]

    def _room(self, rollout: Rollout) -> int:
        """Tokens of the response that the teacher's length has room for twice."""
        taken = len(rollout.prompt_ids) + len(self._phrase(rollout))
        return max((self.args.max_reprompt_len - taken) // 2, 0)
