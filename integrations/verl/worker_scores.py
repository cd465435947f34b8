"""RLSD's teacher scored by verl's own log-probability pass, before the update.

distillation.scored_by=worker
"""

from typing import Any

import torch
import transfer_queue as tq
from tensordict import TensorDict
from torch import Tensor
from transfer_queue import KVBatchMeta

from fused_sd.checks import fail
from fused_sd.integrations.verl.privileged import (
    TeacherBatch,
    lengths_of,
    response_rows,
    rows_of,
    student_rows,
)
from fused_sd.integrations.verl.self_distillation import SelfDistillationConfig

TEACHER_PARTITION = "fused_sd_teacher"  # of the transfer queue, while a worker scores


class WorkerScores:
    """Put before one of verl's trainers, whose workers it asks."""

    self_distillation: SelfDistillationConfig
    config: Any
    actor_rollout_wg: Any
    ref_policy_wg: Any
    ref_in_actor: bool
    use_reference_policy: bool

    def _worker_scores(self, batch: KVBatchMeta, data: TensorDict, teacher: TeacherBatch) -> Tensor:
        """The teacher's log-probabilities of the response, where verl has a server's.

        The samples go through verl's own log-probability pass with the teacher's prompts in place
        of theirs.  Without a context a token has its old log-probability.
        """
        lengths = lengths_of(data["responses"])
        fields = {
            "input_ids": teacher.input_ids,
            "position_ids": teacher.position_ids,
            "prompts": torch.nested.as_nested_tensor(
                [ids[: len(ids) - n] for ids, n in zip(rows_of(teacher.input_ids), lengths)],
                layout=torch.jagged,
            ),
            "responses": data["responses"],
            "response_mask": data["response_mask"],
            "loss_mask": data["response_mask"],
        }
        place = {"keys": batch.keys, "partition_id": TEACHER_PARTITION}
        tq.kv_batch_put(**place, tags=batch.tags, fields=TensorDict(fields, batch_size=len(batch)))
        request = KVBatchMeta(
            **place,
            tags=batch.tags,
            extra_info={
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
        scores = zip(response_rows(found, lengths), rows_of(data["old_log_probs"]), teacher.mask)
        known = [score if has_context else old.to(score) for score, old, has_context in scores]
        return student_rows(known, rows_of(data["prompts"]))

    def _score(self, request: KVBatchMeta) -> None:
        if self.self_distillation.loss.teacher == "live":
            self.actor_rollout_wg.compute_log_prob(request)
        elif self.ref_in_actor:
            request.extra_info["no_lora_adapter"] = True
            self.actor_rollout_wg.compute_log_prob(request)
        else:
            self.ref_policy_wg.compute_ref_log_prob(request)

    def _check_reference_worker(self) -> None:
        config = self.self_distillation
        needs = config.scored_by == "worker" and config.loss.teacher == "reference"
        if needs and not (self.use_reference_policy or self.ref_in_actor):
            fail(
                "distillation_loss.teacher",
                'have a reference worker for "reference" with scored_by="worker"',
                "none",
                "set actor_rollout_ref.actor.use_kl_loss=True (kl_loss_coef=0 to have the worker "
                'alone), or scored_by="engine"',
            )
