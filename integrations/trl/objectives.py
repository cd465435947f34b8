"""TRL's three distillation objectives, from two forwards that have not run yet.

The order of the forwards is each objective's own.  The sampled token and the top-k need one head at
a time; only the full divergence reads both in one forward.

Dimension key:  B sequences, T completion tokens, K entries
"""

from typing import Any

import torch
from torch import Tensor
from trl.experimental.sdpo.loss_utils import (
    add_tail_bucket,
    apply_importance_sampling_clipping,
    compute_divergence,
)

from fused_sd.integrations.shared.completion_scores import log_probs, with_head
from fused_sd.integrations.shared.output_head import Compute
from fused_sd.integrations.trl.scores import (
    Scores,
    entries,
    full_divergence,
    sequence_mean_weights,
    student_entries,
)
from fused_sd.integrations.trl.teachers import teacher_head_is_resharded


class DistillationObjectives:
    """The part of ``FusedSelfDistillationMixin`` that computes ``Scores``.

    Arguments named ``aligned`` are TRL's ``DistillationLogits``, with a ``CompletionForward`` where
    TRL has each side's logits.
    """

    log_fused_metrics = True
    """Whether to log masses, entropies and KLs beside TRL's own metrics."""

    def _score_sampled_token(self, aligned: Any, inputs: dict[str, Any]) -> Scores:
        """Compute the reverse KL's surrogate on the sampled tokens, with one head at a time."""
        alpha = self.args.distillation_alpha
        if alpha != 1.0:
            raise ValueError(
                "Only reverse KL (alpha=1.0) is supported for token-level distillation when "
                f"`distillation_mode='sampled_token'`, got alpha={alpha}"
            )
        ids, mask = aligned.completion_ids, aligned.loss_mask
        student = aligned.student_logits(self._log_probs(ids, self._student_mask(inputs, mask)))
        teacher = self._run_teacher(aligned, self._log_probs(ids, mask))
        log_ratio = (student.log_probs - teacher.log_probs).detach()
        loss = log_ratio * student.log_probs
        loss = self._importance_weighted(loss, student.log_probs, inputs)
        metrics = {"sampled_reverse_kl": log_ratio}
        if self.log_fused_metrics:
            metrics["student_entropy"] = student.entropy.detach()
            metrics["teacher_entropy"] = teacher.entropy
        return Scores(loss, student.log_probs, None, metrics)

    def _score_topk(self, aligned: Any, inputs: dict[str, Any]) -> Scores:
        """Compute the divergence over the student's top-k.

        The student runs first and chooses the ids, then the teacher scores them.
        """
        k = self.args.distillation_topk
        if k is None:
            raise ValueError(
                "`distillation_mode='topk_logits'` requires `distillation_topk` to be set."
            )
        mask = aligned.loss_mask
        scores_tokens = self._has_policy_loss() or self._importance(inputs) is not None
        student, sampled = aligned.student_logits(
            student_entries(
                k,
                mask,
                self.temperature,
                token_ids=aligned.completion_ids if scores_tokens else None,
                token_mask=self._student_mask(inputs, mask),
                differentiable=self._has_policy_loss(),
            )
        )
        teacher = self._run_teacher(aligned, entries(student.token_ids, mask, self.temperature))
        loss, metrics = self._entry_divergence(student.log_probs, teacher.log_probs)
        loss = self._importance_weighted(loss, sampled, inputs)
        return Scores(loss, sampled, None, metrics)

    def _score_full(self, aligned: Any, inputs: dict[str, Any]) -> Scores:
        """Compute the divergence over the vocabulary.

        The teacher runs first and keeps its states.  The divergence runs in the student's forward.
        """
        is_resharded = teacher_head_is_resharded(
            self, aligned.teacher_logits.model, aligned.student_logits.model
        )
        teacher_hidden, teacher_head = self._run_teacher(aligned, with_head(is_resharded))
        output, sampled = aligned.student_logits(
            full_divergence(
                teacher_hidden,
                teacher_head,
                self.args.distillation_alpha,
                self.temperature,
                token_ids=aligned.completion_ids,
                token_weights=sequence_mean_weights(aligned.loss_mask),
                importance=self._importance(inputs),
                policy_mask=inputs["completion_mask"] if self._has_policy_loss() else None,
                observed=self.log_fused_metrics,
            )
        )
        metrics = dict(output.metrics)
        ratio = metrics.pop("importance_ratio", 1.0)
        return Scores(output.token_loss * ratio, sampled, output.loss, metrics)

    def _entry_divergence(
        self,
        student: Tensor,  # (B, T, K)
        teacher: Tensor,  # (B, T, K)
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return TRL's divergence (B, T) over K entries, tailed or renormalised, and metrics."""
        metrics = {}
        if self.log_fused_metrics:
            metrics["student_topk_mass"] = student.detach().exp().sum(-1)
            metrics["teacher_topk_mass"] = teacher.exp().sum(-1)
        if self.args.distillation_add_tail:
            student, teacher = add_tail_bucket(student), add_tail_bucket(teacher)
        else:
            student, teacher = student.log_softmax(-1), teacher.log_softmax(-1)
        if self.log_fused_metrics:
            with torch.no_grad():
                metrics["topk_forward_kl"] = compute_divergence(student, teacher, 0.0)
                metrics["topk_reverse_kl"] = compute_divergence(student, teacher, 1.0)
        return compute_divergence(student, teacher, self.args.distillation_alpha), metrics

    def _importance(self, inputs: dict[str, Any]) -> tuple[Tensor, float] | None:
        """Return old log-probabilities (B, T) and the cap of the importance ratio, or None."""
        clip, old = self.args.distillation_is_clip, inputs.get("old_per_token_logps")
        return None if clip is None or old is None else (old, clip)

    def _importance_weighted(
        self, token_loss: Tensor, sampled: Tensor | None, inputs: dict[str, Any]
    ) -> Tensor:
        importance = self._importance(inputs)
        if importance is None:
            return token_loss
        assert sampled is not None  # scored whenever there is a ratio
        return apply_importance_sampling_clipping(token_loss, sampled, *importance)

    def _log_probs(self, ids: Tensor, mask: Tensor) -> Compute:
        return log_probs(ids, mask, self.temperature, entropy=self.log_fused_metrics)

    def _run_teacher(self, aligned: Any, compute: Compute) -> Any:
        """Run the teacher without gradient, with the adapter that TRL's teacher kind means.

        ``_compute_teacher_student_logits`` has left TRL's context by now, having run nothing in it.
        """
        with torch.no_grad(), self._get_teacher_context_for_self_distillation():
            return aligned.teacher_logits(compute)

    def _has_policy_loss(self) -> bool:
        # SDFT has neither the setting nor the loss.
        return getattr(self.args, "distillation_weight", 1.0) < 1.0

    def _student_mask(self, inputs: dict[str, Any], loss_mask: Tensor) -> Tensor:
        """Return the tokens (B, T) whose student log-probabilities are needed.

        The policy loss averages over all tokens, the distillation over rollouts with a teacher.
        """
        return inputs["completion_mask"] if self._has_policy_loss() else loss_mask
