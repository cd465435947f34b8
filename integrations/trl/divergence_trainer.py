"""Trainers whose loss is a divergence between the student's and the teacher's distributions.

Dimension key:  B sequences, T completion tokens, D hidden size
"""

from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor

from fused_sd import LMHead, LossOutput, trust_region_states
from fused_sd.checks import check_positive_int, check_unit_interval, fail, warn_once
from fused_sd.integrations.trl.config import (
    POLICY_SETTINGS,
    TEACHERS,
    SelfDistillationConfig,
    TeacherSettings,
)
from fused_sd.integrations.trl.scores import DIVERGENCE_METRICS
from fused_sd.integrations.trl.trainer import Inputs, Options, SelfDistillationTrainer
from fused_sd.terms.divergence import DIVERGENCES, Divergence
from fused_sd.terms.divergence_term import named_divergence

StatesAndHead = tuple[Tensor, LMHead]  # states are (B, T, D)


@dataclass
class DivergenceChoice(TeacherSettings):
    """Settings of a loss between distributions: any divergence, and a trust-region teacher."""

    teachers: ClassVar[tuple[str, ...]] = (*TEACHERS, "trust_region")

    distillation_alpha: float = field(
        default=0.5, metadata={"help": "0: KL(t||s), 1: KL(s||t), between: Jensen-Shannon."}
    )
    distillation_topk: int | None = field(
        default=None, metadata={"help": "Entries of the support; None: the whole vocabulary."}
    )

    divergence: str | None = field(
        default=None,
        metadata={
            "help": f"Of {', '.join(DIVERGENCES)}; None: the one that `distillation_alpha` means."
        },
    )
    divergence_parameter: float | None = field(
        default=None, metadata={"help": "Parameter of `divergence`, such as skew_kl's 0.9."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.divergence is None and self.divergence_parameter is not None:
            rule, remedy = "come with divergence", "name the divergence that it belongs to"
            fail("divergence_parameter", rule, self.divergence_parameter, remedy)
        check_unit_interval("distillation_alpha", self.distillation_alpha)
        self.to_divergence()
        entries = self.distillation_topk
        if entries is not None:
            check_positive_int("distillation_topk", entries)
        is_default = entries is not None and entries == type(self).distillation_topk
        if is_default and self.top_k != type(self).top_k:
            warn_once(
                f"top_k={self.top_k} is TRL's, of the sampling; the loss still compares {entries} "
                "entries, which distillation_topk sets"
            )

    def to_divergence(self) -> float | Divergence:
        """Return the divergence that is named, else alpha, which names one of the JSD's family."""
        name, parameter = self.divergence, self.divergence_parameter
        return float(self.distillation_alpha) if name is None else named_divergence(name, parameter)


@dataclass
class DivergenceConfig(DivergenceChoice, SelfDistillationConfig):
    """Settings that OPSD, SDFT and SD-Zero share: a divergence is the whole loss."""

    unread: ClassVar[tuple[str, ...]] = (
        *SelfDistillationConfig.unread,
        *POLICY_SETTINGS,
    )

    num_generations: int = field(default=1, metadata={"help": "Completions of a prompt."})
    scale_rewards: str = field(
        default="none", metadata={"help": "Not read: the loss has no advantage."}
    )


class DivergenceTrainer(SelfDistillationTrainer):
    """Base of methods that override ``divergence``, the loss between two sides' distributions."""

    metrics = (*DIVERGENCE_METRICS, "top1_agreement", "student_log_prob", "teacher_log_prob")
    topk_metrics: ClassVar[tuple[str, ...]] = (
        "student_tail_mass",
        "teacher_tail_mass",
        "topk_overlap",
    )

    def divergence(
        self, student: StatesAndHead, teacher: StatesAndHead, inputs: Inputs, options: Options
    ) -> LossOutput:
        """Return the method's loss."""
        raise NotImplementedError

    def further_metrics(self, inputs: Inputs) -> tuple[str, ...]:
        """Return the metrics that only some settings or batches have."""
        return () if self.args.distillation_topk is None else self.topk_metrics

    def method_loss(
        self, hidden: Tensor, head: LMHead, teacher: Any, inputs: Inputs, options: Options
    ) -> LossOutput:
        states, held = teacher
        other = (states, held.beside(head))
        if self.args.teacher_model_kind == "trust_region":
            rate = self.args.teacher_update_rate
            other = trust_region_states(*other, hidden.detach(), head, rate)
        options = {**options, "token_ids": inputs["completion_ids"]}
        if options["metrics"]:
            options["metrics"] = (*options["metrics"], *self.further_metrics(inputs))
        return self.divergence((hidden, head), other, inputs, options)
