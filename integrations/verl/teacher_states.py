"""What a teacher's worker group sends to the training workers, through verl's TransferQueue.

* ``teacher_states``: a column of verl's batch, jagged (B, K, D'), in the teacher's dtype.  A sample
  has the states that predict the response tokens its loss counts, and none if it has no context.
* the teacher's head: once, in a partition of its own, in blocks of rows.  It comes from the running
  teacher, not from its checkpoint, so that tied weights, a bias, a scale or a soft-cap are what
  ``attach`` has compared with the teacher's own logits.

Dimension key:  B samples, K counted response tokens of a sample, R rows that are computed,
                D' the teacher's hidden size, V vocabulary
"""

import dataclasses
from typing import Any

import torch
import transfer_queue as tq
from tensordict import TensorDict
from torch import Tensor

from fused_sd import LMHead
from fused_sd.checks import fail
from fused_sd.integrations.verl.head_request import LocalTeacher
from fused_sd.integrations.verl.teacher_sequences import jagged

STATES = "teacher_states"
HEAD_PARTITION = "fused_sd_teacher_head"
ROWS_OF_A_BLOCK = 8192  # small messages, which TransferQueue spreads over its storage units


class GroupTeacher:
    """The teacher of a worker group as a training process sees it: its head, and states by batch.

    The head (V, D') stays on the device, frozen, and goes to the CPU with the student's weights.
    """

    def __init__(self) -> None:
        self.head: LMHead | None = None

    def rows(self, micro_batch: TensorDict, rows: Tensor) -> LocalTeacher:
        """Return the teacher's side for rows (R,) of the packed ``teacher_input_ids``."""
        states = states_at(micro_batch, rows)
        if self.head is None:
            self.head = _on(received_head(), states.device)
        head = self.head
        return lambda student_states, student_head: (states, _fitting(head, student_head))

    def to(self, device: str) -> None:
        if self.head is not None:
            self.head = _on(self.head, device)


def states_at(micro_batch: TensorDict, rows: Tensor) -> Tensor:
    """Look up the teacher's states at rows of the packed ``teacher_input_ids``.

    Args:
        micro_batch: holds ``teacher_states``, ``teacher_input_ids``, ``responses`` and
            ``response_mask``.
        rows: (R,) int64; each predicts a token that ``response_mask`` counts.

    Returns:
        (R, D'); 0 for samples that the teacher did not read, whose losses are masked.

    Raises:
        ValueError: the column is missing, or holds other tokens' states than the mask counts.
    """
    if STATES not in micro_batch:
        fail(
            STATES,
            'be in the batch with distillation_loss.teacher="worker_group"',
            "none",
            "set trainer.v1.trainer_mode=fused_sd_sync or fused_sd_colocate_async",
        )
    states, mask = micro_batch[STATES], micro_batch["response_mask"]
    counted = (mask.to_padded_tensor(0) if mask.is_nested else mask) != 0
    num_sent = states.offsets().diff()
    num_counted = counted.sum(1)
    if not torch.equal(num_sent, torch.where(num_sent > 0, num_counted, 0)):
        got = f"{num_sent.tolist()} states for {num_counted.tolist()} tokens"
        rule = "hold a state for each token that response_mask counts, or none"
        fail(STATES, rule, got, "leave response_mask as the trainer's stage found it")
    offsets = micro_batch["teacher_input_ids"].offsets()
    sample = torch.bucketize(rows, offsets, right=True) - 1
    first = offsets[1:] - micro_batch["responses"].offsets().diff() - 1
    nth = counted.cumsum(1)[sample, rows - first[sample]] - 1  # among the sample's counted tokens
    is_sent = num_sent[sample] > 0
    places = (states.offsets()[sample] + nth)[is_sent]
    found = states.values().new_zeros(len(rows), states.values().shape[-1])
    found[is_sent] = states.values()[places]
    return found


def send_head(head: LMHead) -> None:
    """Put a head where ``received_head`` finds it."""
    blocks = {"weight": jagged([rows.cpu() for rows in head.weight.split(ROWS_OF_A_BLOCK)])}
    if head.bias is not None:
        blocks["bias"] = jagged([rows.cpu() for rows in head.bias.split(ROWS_OF_A_BLOCK)])
    count = len(blocks["weight"].unbind())
    names = ("logit_scale", "softcap", "valid_vocab")
    shaping = {name: getattr(head, name) for name in names}
    tq.kv_batch_put(
        keys=[str(n) for n in range(count)],
        partition_id=HEAD_PARTITION,
        fields=TensorDict(blocks, batch_size=count),
        tags=[shaping] * count,
    )


def received_head() -> LMHead:
    """Return the teacher's head, on the CPU."""
    tags = tq.kv_list(HEAD_PARTITION)[HEAD_PARTITION]
    keys = sorted(tags, key=int)
    found = tq.kv_batch_get(keys=keys, partition_id=HEAD_PARTITION)
    shaping: dict[str, Any] = tags[keys[0]]
    for name in found.keys():  # noqa: SIM118  iterating gives rows
        shaping[name] = torch.cat(list(found[name].unbind()))
    return LMHead(**shaping)


def _fitting(head: LMHead, student: LMHead) -> LMHead:
    """Return the teacher's head without the rows that the student's does not have.

    Models of one family pad the same vocabulary to different sizes (Qwen2.5: 151936 and 152064).
    """
    if head.num_tokens < student.num_tokens:
        check_num_rows(head.num_tokens, student.num_tokens)
    return dataclasses.replace(head, valid_vocab=student.num_tokens)


def check_num_rows(teacher: int, student: int) -> None:
    """Refuse a teacher whose head has fewer tokens than the student's."""
    if teacher < student:
        fail(
            "distillation.worker_group.model_path",
            f"name a model that predicts the student's {student} tokens",
            f"{teacher} tokens",
            "choose a teacher of the student's family",
        )


def _on(head: LMHead, device: torch.device | str) -> LMHead:
    bias = None if head.bias is None else head.bias.to(device)
    return dataclasses.replace(head, weight=head.weight.to(device), bias=bias)
