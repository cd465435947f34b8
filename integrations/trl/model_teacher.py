"""Losses between a student and a teacher that is another model.

The teacher runs first and returns its hidden states; the divergence runs in the student's forward.
Of the teacher only the vocabulary has to be the student's.

Dimension key:  B sequences, T tokens, D and D' hidden sizes
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fused_sd import LMHead, LossOutput, gkd_loss
from fused_sd.integrations.shared.as_it_was import left_as_it_was
from fused_sd.integrations.shared.completion_scores import CompletionForward, with_head
from fused_sd.integrations.trl.swaps import attach_or_warn
from fused_sd.integrations.trl.teachers import teacher_head_is_resharded


class ModelTeacherMixin:
    """Mixin before a TRL trainer with a ``teacher_model``, for its divergence without logits.

    A model whose head cannot be reproduced is left to TRL's own loss, with a warning.
    """

    _fused = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        with left_as_it_was(*args, **kwargs):
            super().__init__(*args, **kwargs)
            self._fused = attach_or_warn(self, (self.model, self.teacher_model))

    def _divergence(
        self,
        student: CompletionForward,
        token_weights: Tensor,  # (B, T)
        *,
        beta: float,
        temperature: float = 1.0,
        metrics: Sequence[str] = (),
    ) -> LossOutput:
        """Return the generalised JSD's weighted sum over the last tokens of each sequence.

        Args:
            student: the student's forward; the teacher reads the same inputs.
            token_weights: 0 where a token is left out.
            beta: 0 for KL(t||s), 1 for KL(s||t), between them the generalised Jensen-Shannon.
            temperature: divides both sides' logits.
            metrics: names from ``fused_sd.METRICS``.
        """
        self.teacher_model.eval()
        is_resharded = teacher_head_is_resharded(self, self.teacher_model, student.model)
        with torch.no_grad():
            teacher = dataclasses.replace(student, model=self.teacher_model)
            teacher_hidden, teacher_head = teacher(with_head(is_resharded))

        def compute(hidden: Tensor, head: LMHead) -> LossOutput:
            return gkd_loss(
                hidden,
                head,
                teacher_hidden,
                teacher_head.beside(head),
                beta=beta,
                temperature=temperature,
                token_weights=token_weights,
                reduction="sum",
                metrics=metrics,
            )

        return student(compute)
