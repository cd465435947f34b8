"""SDPG: GRPO with a divergence from the model that knows the answer, and a bond to a reference.

Dimension key:  B sequences, T completion tokens, D hidden size
"""

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from fused_sd import LMHead, LossOutput, divergence_loss
from fused_sd.checks import check_non_negative, check_one_of
from fused_sd.integrations.shared.prompts import check_template
from fused_sd.integrations.trl.config import TeacherSettings
from fused_sd.integrations.trl.contexts import PrivilegedPrompt
from fused_sd.integrations.trl.grpo import PolicyConfig, PolicyTrainer
from fused_sd.integrations.trl.trainer import Inputs, Options
from fused_sd.terms.surrogate import Surrogate, surrogate

# Of d = log_prob - reference_log_prob of the sampled token, by the official code's names.
REFERENCE_TERMS = {
    "fkl": lambda gap: torch.exp(-gap),
    "rkl": lambda gap: (gap + 1).square() / 2,
    "ufkl": lambda gap: torch.exp(-gap) + gap,
    "urkl": lambda gap: gap.square() / 2,
}
MAX_DIVERGENCE = 20.0  # of a token, in nats; beyond it the official code has no gradient


@dataclass
class SDPGConfig(TeacherSettings, PolicyConfig):
    """SDPG's settings; defaults are the official script's (arXiv 2606.04036).

    ``beta`` keeps TRL's meaning: the weight of the term to the reference model, which the official
    code calls alpha.  Its beta is ``distillation_weight`` here.

    Raises:
        ValueError: a value is out of its range, or a setting is given that the method does not
            read.

    Examples:
        >>> from fused_sd.integrations.trl import SDPGConfig
        >>> args = SDPGConfig("out", distillation_weight=0.001, beta=0.001)
        >>> args.teacher_model_kind
        'live'
    """

    # One run over the chunks returns divergence and log-probabilities, with dense gradients.
    unread: ClassVar[tuple[str, ...]] = (
        *(name for name in PolicyConfig.unread if name != "beta"),
        "gradient",
        "gradient_tolerance",
    )

    reprompt_template: str = field(
        default="{prompt}\n\nThe correct answer to this problem is: {privileged}\nUse this to "
        "verify your reasoning, but show your full solution process.",
        metadata={"help": "The teacher's last user turn, from {prompt} and {privileged}."},
    )
    teacher_model_kind: str = field(default="live", metadata={"help": "`live`: the policy itself."})
    distillation_weight: float = field(
        default=0.001, metadata={"help": "Weight of KL(student||teacher)."}
    )
    distillation_warmup_steps: int = field(
        default=0, metadata={"help": "Rollout batches from 0 to the weight."}
    )
    distillation_decay_steps: int = field(
        default=0, metadata={"help": "Last rollout batches, from the weight to 0."}
    )
    positive_only: bool = field(
        default=False, metadata={"help": "Distil completions with a positive advantage alone."}
    )
    teacher_temperature: float = field(
        default=1.0, metadata={"help": "Divides the teacher's logits; `temperature` the student's."}
    )
    beta: float = field(
        default=0.001, metadata={"help": "Weight of the term to the reference; 0: no reference."}
    )
    reference_term: str = field(
        default="urkl",
        metadata={"help": f"Of {', '.join(REFERENCE_TERMS)}; `urkl` is half the squared ratio."},
    )
    delta: float | None = field(
        default=10.0,
        metadata={"help": "Cap of the ratio where the advantage is negative; None: no cap."},
    )
    learning_rate: float = field(default=1e-6, metadata={"help": "Of the optimizer."})
    weight_decay: float = field(default=0.1, metadata={"help": "Of the optimizer."})
    warmup_steps: float = field(default=10, metadata={"help": "Of the learning rate."})
    lr_scheduler_type: str = field(
        default="constant_with_warmup", metadata={"help": "Of the learning rate."}
    )
    max_completion_length: int = field(
        default=4096, metadata={"help": "Longest completion, in tokens."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_template("reprompt_template", self.reprompt_template, "prompt", "privileged")
        check_one_of("reference_term", self.reference_term, tuple(REFERENCE_TERMS))
        for name in ("distillation_weight", "beta"):
            check_non_negative(name, getattr(self, name), "pass 0 to leave the term out")
        for name in ("distillation_warmup_steps", "distillation_decay_steps"):
            check_non_negative(name, getattr(self, name), "pass 0 for none")


class SDPGTrainer(PrivilegedPrompt, PolicyTrainer):
    """SDPG (arXiv 2606.04036): dual-clip GRPO, self-distillation and a reference policy.

    ``-min(rho A, clip(rho) A) + w KL(student||teacher) + beta f(log pi - log pi_ref)`` for each
    token.  The dataset's ``privileged_context`` is the answer; a row without one has no divergence.
    The reference is TRL's reference model.

    Examples:
        >>> from fused_sd.integrations.examples.arithmetic import questions, reward
        >>> from fused_sd.integrations.trl import SDPGConfig, SDPGTrainer
        >>> model = "Qwen/Qwen2.5-0.5B-Instruct"
        >>> args = SDPGConfig("out", beta=0.0)  # without a reference model
        >>> trainer = SDPGTrainer(model, reward, args, questions(64))
        >>> trainer.train()  # doctest: +SKIP
    """

    config_cls = SDPGConfig
    _name = "SDPG"
    needs_privileged = True
    needs_signal = False

    def scalar_metrics(self) -> dict[str, float]:
        return {"distillation_weight": self.scheduled_weight()}

    def scheduled_weight(self) -> float:
        """Return the divergence's weight at the current batch of rollouts, the first of which is 1.

        It rises over the first batches and falls over the last ones; both factors apply.
        """
        args, batch = self.args, self.num_rollout_batches + 1
        weight: float = args.distillation_weight
        if batch < args.distillation_warmup_steps:
            weight *= batch / args.distillation_warmup_steps
        if args.distillation_decay_steps:
            passes = args.steps_per_generation * self.num_iterations
            total = self.state.max_steps * args.gradient_accumulation_steps // passes
            weight *= min(1.0, max(total - batch, 0) / args.distillation_decay_steps)
        return weight

    def method_loss(
        self, hidden: Tensor, head: LMHead, teacher: Any, inputs: Inputs, options: Options
    ) -> LossOutput:
        states, held = teacher
        weights = options["token_weights"]
        observed = ("student_entropy", "teacher_entropy", "reverse_kl", "teacher_log_prob")
        compared = divergence_loss(
            hidden,
            head,
            states,
            held.beside(head),
            divergence="reverse_kl",
            token_clip=MAX_DIVERGENCE,
            token_ids=inputs["completion_ids"],
            token_weights=inputs["loss_mask"],
            with_grad=("student_log_prob",),
            reduction="none",
            temperature=options["temperature"],
            teacher_temperature=self.args.teacher_temperature,
            metrics=observed if options["metrics"] else (),
        )
        assert compared.with_grad is not None
        log_prob = compared.with_grad["student_log_prob"]
        loss, metrics = self.policy_terms(log_prob, inputs)
        loss = loss + self.distilled(inputs).to(loss.dtype) * compared.loss
        loss = torch.where(inputs["loss_mask"] != 0, loss, 0)
        if options["metrics"]:
            metrics |= {**compared.metrics, "student_log_prob": log_prob.detach()}
        return LossOutput((loss * weights).sum(), loss.detach(), metrics)

    def distilled(self, inputs: Inputs) -> Tensor:
        """Return each sequence's weight of the divergence (B, 1)."""
        taught = inputs["self_distillation_mask"].double() * self.scheduled_weight()
        if self.args.positive_only:
            taught = taught * (inputs["advantages"] > 0)
        return taught[:, None]

    def policy_terms(self, log_prob: Tensor, inputs: Inputs) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the clipped surrogate and the term to the reference (B, T), and what to log."""
        counted, now = inputs["loss_mask"] != 0, log_prob.detach()

        def known(other: Tensor | None) -> Tensor:
            """Another policy's log-probabilities, where a token counts."""
            return now if other is None else torch.where(counted, other.to(now), 0)

        given = {
            "advantages": self.token_advantages(inputs),
            "old_log_probs": known(inputs.get("old_per_token_logps")),
        }
        clips = (self.epsilon_low, self.epsilon_high)
        term = surrogate(Surrogate(ratio_clip=clips, dual_clip=self.args.delta), now, given)
        loss = term.loss + term.dlog_prob * (log_prob - now)
        if not self.args.beta:
            return loss, term.metrics
        gap = log_prob - known(inputs["ref_per_token_logps"])
        bond = REFERENCE_TERMS[self.args.reference_term](gap)
        return loss + self.args.beta * bond, {**term.metrics, "reference_term": bond.detach()}
