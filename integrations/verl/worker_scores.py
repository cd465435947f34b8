"""Scores RLSD's teacher with verl's own log-probability pass, before the update.

Chosen by ``distillation.scored_by=worker``; it needs no engine of fused_sd.
"""

from typing import Any

import transfer_queue as tq
from tensordict import TensorDict
from torch import Tensor
from transfer_queue import KVBatchMeta

from fused_sd.checks import fail
from fused_sd.integrations.verl.config_checks import check_starts_without_adapter
from fused_sd.integrations.verl.packed_rows import verls_positions
from fused_sd.integrations.verl.self_distillation import SelfDistillationConfig
from fused_sd.integrations.verl.teacher_sequences import (
    TeacherBatch,
    at_student_rows,
    jagged,
    lengths_of,
    response_rows,
)

TEACHER_PARTITION = "fused_sd_teacher"  # of the TransferQueue, while a worker scores


class WorkerScores:
    """A mixin for verl's trainers, whose worker groups it calls."""

    self_distillation: SelfDistillationConfig
    config: Any
    actor_rollout_wg: Any
    ref_policy_wg: Any
    ref_in_actor: bool
    use_reference_policy: bool

    def _worker_scores(self, batch: KVBatchMeta, data: TensorDict, teacher: TeacherBatch) -> Tensor:
        """Return the teacher's log-probabilities of the response, shaped like a server's.

        The samples go through verl's log-probability pass with the teacher's prompts in place of
        their own.  A token of a sample without a context gets its old log-probability.

        verl's workers read their inputs from the TransferQueue and write ``log_probs`` back under
        the same keys.  The pass therefore runs in a partition of its own: in the training partition
        it would overwrite the student's sequences and log-probabilities.
        """
        lengths = lengths_of(data["responses"])
        fields = {
            "input_ids": teacher.input_ids,
            "position_ids": verls_positions(teacher.position_ids),
            "prompts": jagged(
                [ids[: len(ids) - n] for ids, n in zip(teacher.input_ids.unbind(), lengths)]
            ),
            "responses": data["responses"],
            "response_mask": data["response_mask"],
            "loss_mask": data["response_mask"],
        }
        place = {"keys": batch.keys, "partition_id": TEACHER_PARTITION}
        if "multi_modal_inputs" in data.keys():  # noqa: SIM118  a TensorDict iterates over rows
            # The queue cannot show a sample's pixels in two partitions, so that they are sent again
            fields["multi_modal_inputs"] = data["multi_modal_inputs"]
        tq.kv_batch_put(**place, tags=batch.tags, fields=TensorDict(fields, batch_size=len(batch)))
        request = KVBatchMeta(
            **place,
            tags=batch.tags,
            extra_info={
                # as in verl's own _compute_ref_log_prob
                "calculate_entropy": False,
                "compute_loss": False,
                "temperature": self.config.actor_rollout_ref.rollout.temperature,
            },
        )
        try:
            self._score(request)
            found = tq.kv_batch_get(**place, select_fields=["log_probs"])["log_probs"]
        finally:
            tq.kv_clear(**place)
        scores = zip(response_rows(found, lengths), data["old_log_probs"].unbind(), teacher.mask)
        known = [score if has_context else old.to(score) for score, old, has_context in scores]
        return at_student_rows(known, data["prompts"].unbind())

    def _score(self, request: KVBatchMeta) -> None:
        """Let the workers that hold the teacher's weights score the request."""
        if self.self_distillation.loss.teacher == "live":
            self.actor_rollout_wg.compute_log_prob(request)
        elif self.ref_in_actor:
            # with LoRA verl has no reference worker: the policy without its adapter is one
            request.extra_info["no_lora_adapter"] = True
            self.actor_rollout_wg.compute_log_prob(request)
        else:
            self.ref_policy_wg.compute_ref_log_prob(request)

    def _check_reference_worker(self) -> None:
        """Refuse a reference teacher that verl has no worker for, or no weights."""
        config = self.self_distillation
        if config.scored_by != "worker" or config.loss.teacher != "reference":
            return
        check_starts_without_adapter(self.config.actor_rollout_ref.model)
        if not (self.use_reference_policy or self.ref_in_actor):
            fail(
                "distillation_loss.teacher",
                'have a reference worker for "reference" with scored_by="worker"',
                "none",
                "set actor_rollout_ref.actor.use_kl_loss=True (kl_loss_coef=0 to have the worker "
                'alone), or scored_by="engine"',
            )
