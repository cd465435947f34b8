"""SD-Zero's second phase: the model that revises teaches the model that answers.

Dimension key:  B sequences, T completion tokens
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from fused_sd import LossOutput, sd_zero_loss
from fused_sd.checks import check_bool, check_one_of, check_unit_interval, fail
from fused_sd.integrations.shared.as_it_was import left_as_it_was
from fused_sd.integrations.shared.chat_format import check_chat_format, recorded_chat_format
from fused_sd.integrations.shared.revision_phrases import phrase_ids, phrases_for, without_end
from fused_sd.integrations.shared.rollouts import Rollout
from fused_sd.integrations.trl.divergence_trainer import (
    DivergenceConfig,
    DivergenceTrainer,
    StatesAndHead,
)
from fused_sd.integrations.trl.trainer import Inputs, Options


@dataclass
class SDZeroConfig(DivergenceConfig):
    """SD-Zero's settings; defaults are those of the official script (arXiv 2604.12002).

    The script's configuration file has another learning rate, 1e-5.  A step of the official run has
    128 questions with one response each, and there are 1000 steps.  Its warm-up begins at a tenth
    of the learning rate, and this one at 0.  There prompt and response together have 8192 tokens;
    with vLLM, ``vllm_max_model_length=8192`` limits them together.

    For the paper's iterative self-evolution, which renews the teacher, pass
    ``teacher_model_kind="synced", teacher_sync_steps=400``.

    Examples:
        >>> from fused_sd.integrations.trl import SDZeroConfig
        >>> args = SDZeroConfig("out", teacher_model_kind="synced", teacher_sync_steps=400)
        >>> args.variant, args.distillation_topk
        ('code', 64)
    """

    unread: ClassVar[tuple[str, ...]] = (
        *DivergenceConfig.unread,
        "distillation_alpha",
        "divergence",
        "divergence_parameter",
    )

    learning_rate: float = field(default=5e-6, metadata={"help": "Peak learning rate."})
    lr_scheduler_type: str = field(
        default="constant_with_warmup", metadata={"help": "Learning rate schedule."}
    )
    warmup_steps: float = field(
        default=20, metadata={"help": "Warm-up, in steps or as a share of all."}
    )
    weight_decay: float = field(default=0.01, metadata={"help": "AdamW's weight decay."})
    max_completion_length: int | None = field(
        default=8192, metadata={"help": "Tokens to sample at most."}
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
    correct_phrase: str | None = field(
        default=None,
        metadata={
            "help": "What follows a response that was right; None: the official phrase for the "
            "model's family."
        },
    )
    wrong_phrase: str | None = field(
        default=None,
        metadata={"help": "What follows a response that was wrong; None as for `correct_phrase`."},
    )
    keep_response_end: bool = field(
        default=True,
        metadata={
            "help": "Show the teacher the end token of the response before the phrase, as the "
            "official code does; phase 1's traces have none there."
        },
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
        check_bool("keep_response_end", self.keep_response_end)
        check_unit_interval("forward_weight", self.forward_weight)


class SDZeroTrainer(DivergenceTrainer):
    """SD-Zero's phase 2 (arXiv 2604.12002).

    The teacher reads the prompt, the student's own response and a phrase that says whether it was
    right, and then scores the same response again.  As in the official code, the response is read
    whole: with its end if it has one (``keep_response_end``), and with the results of tools.

    Start from the model and the tokenizer that ``SRTTrainer`` saved: the prompts are then written
    with the chat template's arguments of phase 1.

    Raises:
        ValueError: ``chat_template_kwargs`` differ from those of phase 1.

    Examples:
        >>> from fused_sd.integrations.examples.arithmetic import questions, reward
        >>> from fused_sd.integrations.trl import SDZeroConfig, SDZeroTrainer
        >>> model = "Qwen/Qwen2.5-0.5B-Instruct"  # or what SRTTrainer saved
        >>> trainer = SDZeroTrainer(model, reward, SDZeroConfig("out"), questions(64))
        >>> trainer.train()  # doctest: +SKIP
    """

    config_cls = SDZeroConfig
    _name = "SD-Zero"

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        with left_as_it_was(*args, **kwargs):
            super().__init__(*args, **kwargs)
            given = self.args.correct_phrase, self.args.wrong_phrase
            self.phrases = phrases_for(self.model.config, *given)
            used: Any = self.chat_template_kwargs  # a dict, once the configuration is made
            if used:
                check_chat_format(self.processing_class, used)
            else:
                self.chat_template_kwargs = recorded_chat_format(self.processing_class) or {}

    def teacher_prompts(self, rollout: Rollout) -> list[int] | None:
        response = rollout.completion_ids[: self._longest(rollout)]
        # Without a verdict there is no phrase; prompt and phrase may leave no space for a response.
        if math.isnan(rollout.reward) or not response:
            return None
        if not self.args.keep_response_end:
            response = without_end(self._tokenizer, response)
        return [*rollout.prompt_ids, *response, *self._phrase(rollout)]

    def more_inputs(self, rollouts: Sequence[Rollout], output: dict[str, Any]) -> dict[str, Tensor]:
        # A response that is cut in the teacher's sequence has loss up to the cut.
        mask = output["loss_mask"]
        lengths = torch.tensor([self._longest(rollout) for rollout in rollouts], device=mask.device)
        columns = torch.arange(mask.size(1), device=mask.device)
        return {"loss_mask": mask * (columns < lengths[:, None])}

    def divergence(
        self, student: StatesAndHead, teacher: StatesAndHead, inputs: Inputs, options: Options
    ) -> LossOutput:
        # variant="paper" has no support, and ``sd_zero_loss`` does not take None for one
        top_k = self.args.distillation_topk
        support = {} if top_k is None else {"top_k": top_k}
        return sd_zero_loss(
            *student,
            *teacher,
            variant=self.args.variant,
            forward_weight=self.args.forward_weight,
            **support,
            **options,
        )

    def _phrase(self, rollout: Rollout) -> list[int]:
        is_correct = rollout.reward > self.args.success_reward_threshold
        return phrase_ids(self._tokenizer, self.phrases.after(is_correct))

    def _longest(self, rollout: Rollout) -> int:
        """Return how many tokens of the response fit twice into the teacher's sequence."""
        taken = len(rollout.prompt_ids) + len(self._phrase(rollout))
        return max((self.args.max_reprompt_len - taken) // 2, 0)
