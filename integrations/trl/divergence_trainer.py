"""Trainers whose loss is a divergence between the student's and the teacher's distributions.

Dimension key:  B sequences, T completion tokens, D hidden size
"""

from typing import Any, ClassVar

from torch import Tensor

from fused_sd import LMHead, LossOutput
from fused_sd.integrations.shared.completion_scores import DIVERGENCE_METRICS
from fused_sd.integrations.trl.trainer import Run, SelfDistillationTrainer
from fused_sd.teaching.trust_region import trust_region_states


class DivergenceTrainer(SelfDistillationTrainer):
    """A method writes ``divergence``, the loss between two pairs of states and head."""

    metrics = (*DIVERGENCE_METRICS, "top1_agreement", "student_log_prob", "teacher_log_prob")
    topk_metrics: ClassVar[tuple[str, ...]] = (
        "student_tail_mass",
        "teacher_tail_mass",
        "topk_overlap",
    )

    def divergence(
        self,
        student: tuple[Tensor, LMHead],
        teacher: tuple[Tensor, LMHead],
        inputs: dict[str, Any],
        run: Run,
    ) -> LossOutput:
        """The method's loss; states are (B, T, D)."""
        raise NotImplementedError

    def further_metrics(self, inputs: dict[str, Any]) -> tuple[str, ...]:
        """Metrics that the settings or the batch make meaningful."""
        return () if self.args.distillation_topk is None else self.topk_metrics

    def method_loss(
        self, hidden: Tensor, head: LMHead, teacher: Any, inputs: dict[str, Any], run: Run
    ) -> LossOutput:
        states, held = teacher
        known = (states, held.beside(head))
        if self.args.teacher_model_kind == "trust_region":
            rate = self.args.teacher_update_rate
            known = trust_region_states(*known, hidden.detach(), head, rate)
        run = {**run, "token_ids": inputs["completion_ids"]}
        if run["metrics"]:
            run["metrics"] = (*run["metrics"], *self.further_metrics(inputs))
        return self.divergence((hidden, head), known, inputs, run)
