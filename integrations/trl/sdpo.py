"""SDPO: the teacher is the model itself, shown a successful sibling or feedback.

Dimension key:  B sequences, T completion tokens, D hidden size
"""

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, get_args

from torch import Tensor
from trl.experimental.sdpo import SDPOTrainer as StockSDPOTrainer

from fused_sd import ImportanceCap, LMHead, LossOutput, grpo_loss, sampled_kl_loss, sdpo_loss
from fused_sd.checks import check_one_of, check_unit_interval, fail
from fused_sd.integrations.shared import templates
from fused_sd.integrations.shared.prompts import (
    check_sibling_settings,
    has_demonstration,
    sibling_prompt,
)
from fused_sd.integrations.shared.rollouts import Rollout
from fused_sd.integrations.trl.config import SelfDistillationConfig, TokenCorrection, check_bounds
from fused_sd.integrations.trl.divergence_trainer import (
    DivergenceChoice,
    DivergenceTrainer,
    StatesAndHead,
)
from fused_sd.integrations.trl.sparse_gradients import mixed_certificate
from fused_sd.integrations.trl.trainer import Inputs, Options

Mode = Literal["sampled_token", "full_logits", "topk_logits"]


@dataclass
class SDPOConfig(TokenCorrection, DivergenceChoice, SelfDistillationConfig):
    """SDPO's settings; defaults are those of the official runs without feedback (2601.20802).

    For the runs with feedback pass ``distillation_alpha=1, distillation_topk=20,
    teacher_update_rate=0.01, learning_rate=1e-6, warmup_steps=0``.  The names are those of TRL's
    SDPOConfig, whose defaults differ.

    Examples:
        >>> from fused_sd.integrations.trl import SDPOConfig
        >>> args = SDPOConfig("out", distillation_alpha=1, distillation_topk=20)
        >>> args.distillation_add_tail, args.teacher_model_kind
        (True, 'ema')
        >>> SDPOConfig("out", distillation_mode="full_logits", distillation_topk=20)
        Traceback (most recent call last):
        ValueError: distillation_topk must be None, got 'full_logits'; ...
    """

    learning_rate: float = field(default=1e-5, metadata={"help": "Peak learning rate."})
    warmup_steps: float = field(default=10, metadata={"help": "Steps to the peak."})
    max_completion_length: int | None = field(
        default=8192, metadata={"help": "Tokens to sample at most."}
    )
    chat_template_kwargs: dict | str | None = field(
        default_factory=lambda: {"enable_thinking": False},
        metadata={"help": "For the chat template; one without thinking does not read it."},
    )
    distillation_mode: Mode = field(
        default="topk_logits",
        metadata={"help": "`topk_logits`, `full_logits` or `sampled_token` (alpha 1)."},
    )
    distillation_topk: int | None = field(
        default=100, metadata={"help": "Entries of the student's support in `topk_logits`."}
    )
    distillation_add_tail: bool = field(
        default=True, metadata={"help": "One bucket for all other entries, or renormalise."}
    )
    distillation_is_clip: float | None = field(
        default=2.0, metadata={"help": "Cap of the ratio to the old policy; None: no ratio."}
    )
    distillation_weight: float = field(
        default=1.0, metadata={"help": "Share of the divergence; the rest is GRPO's loss."}
    )
    tail_floor: float | None = field(
        default=None, metadata={"help": "1e-7 for the official code's clamp; None: exact tail."}
    )
    loss_type: str = field(default="bnpo", metadata={"help": "Average of the token losses."})
    scale_rewards: str = field(
        default="none", metadata={"help": "Read only where `distillation_weight` is below 1."}
    )
    use_successful_as_teacher: bool = field(
        default=True, metadata={"help": "Show the teacher a successful sibling."}
    )
    success_reward_threshold: float = field(
        default=0.5,
        metadata={"help": "Reward from which on a rollout is shown to its siblings' teacher."},
    )
    dont_reprompt_on_self_success: bool = field(
        default=True, metadata={"help": "Never show a rollout its own text."}
    )
    include_environment_feedback: bool = field(
        default=True, metadata={"help": "Show the teacher what `feedback_func` said."}
    )
    environment_feedback_only_without_solution: bool = field(
        default=True, metadata={"help": "Leave feedback out beside a successful sibling."}
    )
    observation_as_feedback: bool = field(
        default=False,
        metadata={"help": "A rollout without feedback has its last tool result for one."},
    )
    remove_thinking_from_demonstration: bool = field(
        default=True,
        metadata={"help": "Leave thoughts out of what the teacher is shown of a completion."},
    )
    thinking_tags: list[str] | None = field(
        default=None,
        metadata={"help": "Opening and closing tag of thoughts; None: the pairs that are known."},
    )
    include_own_attempt: bool = field(
        default=False, metadata={"help": "Show the teacher the student's own attempt."}
    )
    reprompt_template: str = field(
        default=templates.SDPO,
        metadata={"help": "The teacher's last user turn."},
    )
    solution_template: str = field(
        default=templates.SDPO_SOLUTION,
        metadata={"help": "The part with a sibling's solution."},
    )
    feedback_template: str = field(
        default=templates.SDPO_FEEDBACK,
        metadata={"help": "The part with the feedback."},
    )
    attempt_template: str = field(
        default=templates.SDPO_ATTEMPT,
        metadata={"help": "Put before the feedback with `include_own_attempt`."},
    )

    def __post_init__(self) -> None:
        check_one_of("distillation_mode", self.distillation_mode, get_args(Mode))
        check_unit_interval("distillation_weight", self.distillation_weight)
        check_bounds(self, "distillation_is_clip", "tail_floor")
        if self.distillation_mode != "topk_logits":
            if self.distillation_topk not in (None, type(self).distillation_topk):
                mode = repr(self.distillation_mode)
                fail("distillation_topk", "be None", mode, 'or distillation_mode="topk_logits"')
            self.distillation_topk = None
        super().__post_init__()
        if self.divergence is not None and self.distillation_mode == "sampled_token":
            rule = (
                'be None with distillation_mode="sampled_token", which has an estimator of KL(s||t)'
            )
            fail(
                "divergence", rule, repr(self.divergence), "compare distributions, or leave it out"
            )
        check_sibling_settings(self)


class SDPOTrainer(DivergenceTrainer):
    """SDPO (arXiv 2601.20802) with the official code's contexts, loss and reduction.

    A rollout's teacher sees the first successful sibling, or feedback, or both.  Feedback is what
    ``feedback_func`` or the environment's ``get_feedback`` returned; where neither is asked it
    is ``privileged_context``, as in TRL.  A rollout with neither has weight 0.  The loss is
    ``distillation_weight`` times the divergence plus the rest times GRPO's loss (eq. 3).

    Examples:
        >>> from fused_sd.integrations.examples.arithmetic import feedback, questions, reward
        >>> from fused_sd.integrations.trl import SDPOConfig, SDPOTrainer
        >>> model = "Qwen/Qwen2.5-0.5B-Instruct"
        >>> args = SDPOConfig("out", max_completion_length=256)
        >>> trainer = SDPOTrainer(model, reward, args, questions(64), feedback_func=feedback)
        >>> trainer.hears_feedback
        True
        >>> trainer.train()  # doctest: +SKIP
    """

    config_cls: ClassVar[Any] = SDPOConfig
    _name = "SDPO"
    _paper = StockSDPOTrainer._paper

    def teacher_prompts(self, rollout: Rollout) -> list[int] | None:
        prompt = sibling_prompt(rollout, self._feedback_on(rollout), self.args)
        return None if prompt is None else self.tokenize(prompt, rollout.tools)

    def context_flags(self, rollout: Rollout) -> dict[str, bool]:
        args, feedback = self.args, (self._feedback_on(rollout) or "").strip()
        solved = args.use_successful_as_teacher and has_demonstration(rollout, args)
        unneeded = solved and args.environment_feedback_only_without_solution
        every = rollout.siblings(
            threshold=args.success_reward_threshold, successful=True, itself=True
        )
        return {
            "success_group_fraction": bool(every),
            "success_sample_fraction": bool(solved),
            "feedback_available_fraction": bool(feedback),
            "feedback_used_fraction": bool(
                feedback and args.include_environment_feedback and not unneeded
            ),
        }

    def _feedback_on(self, rollout: Rollout) -> str | None:
        said = rollout.feedback
        if said is None and self.args.observation_as_feedback:
            said = rollout.observation
        if said is None and not self.hears_feedback:
            said = rollout.hint
        return said

    @property
    def needs_signal(self) -> bool:  # type: ignore[override]
        """Whether a rollout without context has weight 0: unless GRPO's loss is the whole loss."""
        return bool(self.args.distillation_weight)

    def score_teacher(self, inputs: Inputs) -> Any:
        return super().score_teacher(inputs) if self.args.distillation_weight else None

    def method_loss(
        self, hidden: Tensor, head: LMHead, teacher: Any, inputs: Inputs, options: Options
    ) -> LossOutput:
        share = self.args.distillation_weight
        if share == 1:
            return super().method_loss(hidden, head, teacher, inputs, options)
        policy = grpo_loss(
            hidden,
            head,
            inputs["completion_ids"],
            self.token_advantages(inputs),
            old_log_probs=inputs.get("old_per_token_logps"),
            ratio_clip=(self.epsilon_low, self.epsilon_high),
            dual_clip=self.args.delta,
            token_weights=self.token_weights(inputs, self.sampled_mask(inputs)),
            temperature=self.temperature,
            reduction="sum",
            gradient=options["gradient"],
            tolerance=options["tolerance"],
        )
        if share == 0:
            return policy
        own = super().method_loss(hidden, head, teacher, inputs, options)
        return own._replace(
            loss=(1 - share) * policy.loss + share * own.loss,
            certificate=mixed_certificate(policy.certificate, own.certificate, share),
        )

    def further_metrics(self, inputs: Inputs) -> tuple[str, ...]:
        has_ratio = self.args.distillation_is_clip is not None and "old_per_token_logps" in inputs
        capped = ("importance_ratio", "importance_cap_fraction") if has_ratio else ()
        return (*super().further_metrics(inputs), *capped)

    def divergence(
        self, student: StatesAndHead, teacher: StatesAndHead, inputs: Inputs, options: Options
    ) -> LossOutput:
        args = self.args
        old, cap = inputs.get("old_per_token_logps"), args.distillation_is_clip
        if args.distillation_mode == "sampled_token":
            importance = None if old is None or cap is None else ImportanceCap(old, cap)
            observed = ("student_log_prob", "teacher_log_prob", "student_entropy")
            return sampled_kl_loss(
                *student,
                teacher_hidden=teacher[0],
                teacher_head=teacher[1],
                importance=importance,
                **{**options, "metrics": observed if options["metrics"] else ()},
            )
        return sdpo_loss(
            *student,
            *teacher,
            alpha=args.to_divergence(),
            top_k=args.distillation_topk,
            add_tail=args.distillation_add_tail,
            tail_floor=args.tail_floor,
            old_log_probs=old,
            importance_cap=cap,
            **options,
        )
