"""The loss of a trainer whose teacher is a server, which returns log-probabilities of few entries.

Dimension key:  B sequences, T completion tokens, K entries
"""

from typing import Any

import torch
from torch import Tensor, nn

from fused_sd.integrations.shared.completion_scores import (
    Scores,
    log_probs,
    sequence_mean_weights,
    student_entries,
)


class TeacherServerLoss:
    """The server's part of ``FusedSelfDistillationMixin``."""

    def _compute_server_distillation_loss(self, model: nn.Module, inputs: dict[str, Any]) -> Tensor:
        """TRL's objective on the entries that a teacher server returns."""
        if not self._fused:
            return super()._compute_server_distillation_loss(model, inputs)
        if self.state.global_step != self._last_loaded_step:
            # buffered batches outlive an optimizer step; every rank waits for the push
            self.vllm_generation.sync_weights()
            self.accelerator.wait_for_everyone()
            self._last_loaded_step = self.state.global_step
        aligned = super()._compute_teacher_student_logits(model, model, inputs)
        ids, mask = aligned.completion_ids, aligned.loss_mask
        teacher = self._get_teacher_token_logprobs_from_server(inputs, ids.size(1))
        required, sampled_teacher = mask.bool(), teacher["actual_logprobs"]
        if (required & ~torch.isfinite(sampled_teacher)).any():
            raise ValueError("Teacher server returned no logprob for a required completion token.")
        sampled_teacher = sampled_teacher.masked_fill(~required, 0)
        if self.args.distillation_mode == "sampled_token":
            sampled = aligned.student_logits(log_probs(ids, mask, self.temperature)).log_probs
            loss, metrics = (sampled - sampled_teacher).detach() * sampled, {}
        else:
            student, sampled = aligned.student_logits(
                student_entries(
                    teacher["topk_token_ids"],
                    mask,
                    self.temperature,
                    token_ids=ids,
                    token_mask=mask,
                )
            )
            # padding comes as -inf
            entry_teacher = teacher["topk_logprobs"].masked_fill(~required[..., None], 0)
            loss, metrics = self._entry_divergence(student.log_probs, entry_teacher)
        drift = (sampled.detach() - sampled_teacher).abs()
        mean_drift = (drift * mask).sum() / mask.sum().clamp(min=1.0)
        self._metrics[self._phase(model)]["self_distillation/server_logprob_abs_diff"].append(
            self.accelerator.gather(mean_drift).mean().item()
        )
        loss = self._importance_weighted(loss, sampled, inputs)
        self._log_scores(model, Scores(loss, sampled, None, metrics), mask)
        return (loss * sequence_mean_weights(mask)).sum()
