"""What verl's micro-batch asks of ``lm_head.forward``.

Dimension key:  B sequences, N packed rows, R rows that are computed, K a server's entries,
                D hidden size, V vocabulary
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from tensordict import TensorDict
from torch import Tensor
from verl.utils import tensordict_utils as tu
from verl.workers.config import DistillationLossConfig

from fused_sd import LMHead
from fused_sd.integrations.transformers import Request
from fused_sd.integrations.verl import fused_terms
from fused_sd.integrations.verl.rows import Placed, response_values

TeacherSide = Callable[[Tensor, LMHead], tuple[Tensor, LMHead]]
"""A local teacher, asked inside ``lm_head.forward``, where alone the student's head is whole.

Takes the student's states (R, D) and head, without gradients, and returns the teacher's states
(R, D') and head, which may be the student's head.  A head of its own has to stay whole until the
micro-batch's backward is done, which reads it again.
"""


class Terms(NamedTuple):
    """What lm_head returns: (R,) fp32, named as in verl's model output; None: not asked for."""

    log_probs: Tensor | None = None
    entropy: Tensor | None = None
    distillation_losses: Tensor | None = None
    student_mass: Tensor | None = None
    teacher_mass: Tensor | None = None
    teacher_log_probs: Tensor | None = None  # of the sampled tokens, by a local teacher


def flag(batch: TensorDict, name: str) -> bool:
    return bool(tu.get_non_tensor_data(data=batch, key=name, default=False))


def loss_config_of(loss_function: Any) -> DistillationLossConfig | None:
    """The distillation loss's settings, from the partial that verl's worker makes."""
    config = getattr(loss_function, "keywords", {}).get("distillation_config")
    return None if config is None else config.distillation_loss


def has_local_teacher(loss_config: DistillationLossConfig | None) -> bool:
    return loss_config is not None and loss_config.get("teacher", "server") != "server"


def score_request(
    batch: TensorDict,
    placed: Placed,
    loss_config: DistillationLossConfig | None,
    teacher: TeacherSide | None,
) -> Request:
    """The request whose result is the ``Terms`` of the rows that are placed here."""
    rows = placed.rows
    ids = torch.roll(batch["input_ids"].values(), -1)[rows]
    wanted: dict[str, Any] = {
        "temperature": float(batch["temperature"]),
        "log_probs": not flag(batch, "distillation_only"),
        "entropy": flag(batch, "calculate_entropy"),
    }
    from_server = teacher is None and flag(batch, "distillation_use_topk")
    if from_server or teacher is not None:
        wanted["loss_config"] = loss_config
        if "old_log_probs" in batch:
            wanted["old_log_probs"] = response_values(batch, "old_log_probs", rows)
    if from_server and "teacher_ids" in batch:
        wanted["teacher_token_ids"] = batch["teacher_ids"].values()[rows]
        wanted["teacher_log_probs"] = batch["teacher_logprobs"].values()[rows]

    def compute(hidden: Tensor, head: LMHead) -> Terms:
        side = None
        if teacher is not None:
            side = _without_gradient(*teacher(*_without_gradient(hidden, head)))
        return Terms(**fused_terms.fused_terms(hidden, head, ids, teacher=side, **wanted))

    return Request(compute, placed.positions)


def _without_gradient(hidden: Tensor, head: LMHead) -> tuple[Tensor, LMHead]:
    bias = None if head.bias is None else head.bias.detach()
    return hidden.detach(), dataclasses.replace(head, weight=head.weight.detach(), bias=bias)
