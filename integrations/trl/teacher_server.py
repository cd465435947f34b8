"""The loss where the teacher is a vLLM server, which returns log-probabilities of few entries.

Dimension key:  B sequences, T completion tokens, K entries
"""

import warnings
from typing import Any

import torch
from torch import Tensor, nn

from fused_sd.integrations.shared.completion_scores import log_probs
from fused_sd.integrations.trl.scores import Scores, sequence_mean_weights, student_entries


class TeacherServerLoss:
    """The part of ``FusedSelfDistillationMixin`` for ``use_teacher_server=True``.

    TRL's generation server holds the student's weights, and scores the teacher's prompts with them
    (read in TRL 1.16; releases without a teacher server never call this method).
    """

    def _compute_server_distillation_loss(self, model: nn.Module, inputs: dict[str, Any]) -> Tensor:
        """Compute TRL's objective on the entries that the server returns.

        TRL's method takes the student's whole logits; this one scores the server's entries in the
        student's forward.  The other steps follow TRL's, in its order.
        """
        if self.temperature != 1:
            warnings.warn(
                "a teacher server's log-probabilities are at temperature 1 (vLLM's prompt_logprobs "
                f"know no other) and the student's at {self.temperature:g}: TRL compares the two; "
                "leave temperature at 1",
                stacklevel=2,
            )
        if not self._fused:
            return super()._compute_server_distillation_loss(model, inputs)
        if self.state.global_step != self._last_loaded_step:
            # With num_iterations > 1 a batch outlives an optimizer step, and the server would score
            # it with old weights.  Only the main process pushes, so the others have to wait.
            self.vllm_generation.sync_weights()
            self.accelerator.wait_for_everyone()
            self._last_loaded_step = self.state.global_step
        # TRL's method, not the mixin's: it aligns the masks and asks for two forwards, which
        # ``_forward_logits`` returns without running them.  Only the student's is run below.
        aligned = super()._compute_teacher_student_logits(model, model, inputs)
        ids, mask = aligned.completion_ids, aligned.loss_mask
        teacher = self._ask_server(inputs, ids.size(1))
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
            # The server's values end where a completion ends.  TRL fills the rest with -inf, which
            # would be NaN in the divergence before the weight of 0 takes it out.
            entry_teacher = teacher["topk_logprobs"].masked_fill(~required[..., None], 0)
            loss, metrics = self._entry_divergence(student.log_probs, entry_teacher)
        # TRL logs this to show a server whose weights are not the student's.
        drift = (sampled.detach() - sampled_teacher).abs()
        mean_drift = (drift * mask).sum() / mask.sum().clamp(min=1.0)
        self._metrics[self._phase(model)]["self_distillation/server_logprob_abs_diff"].append(
            self.accelerator.gather(mean_drift).mean().item()
        )
        loss = self._importance_weighted(loss, sampled, inputs)
        self._log_scores(model, Scores(loss, sampled, None, metrics), mask)
        return (loss * sequence_mean_weights(mask)).sum()

    def _ask_server(self, inputs: dict[str, Any], length: int) -> dict[str, Tensor]:
        """Return the server's scores; an error names the server.

        TRL's client tries a request again 3 times after an answer of 500, 502 or 503, and 5 times
        where the connection breaks.  It waits for an answer without limit.
        """
        try:
            return self._get_teacher_token_logprobs_from_server(inputs, length)
        except Exception as error:  # TRL raises bare ones, beside those of requests
            raise RuntimeError(
                f"the teacher server at {self.teacher_client.base_url} gave no scores: {error!r}.  "
                "No step was made of this batch: look at the server's log, and resume from the "
                "last checkpoint"
            ) from error
