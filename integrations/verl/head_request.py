"""Translates a micro-batch of verl's into the request that ``lm_head.forward`` answers.

Dimension key:  B sequences, N packed rows, R rows that are computed, K entries sent by a server,
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
from fused_sd.integrations.verl import token_outputs
from fused_sd.integrations.verl.packed_rows import PlacedRows, response_values

LocalTeacher = Callable[[Tensor, LMHead], tuple[Tensor, LMHead]]
"""A teacher in this process, called inside ``lm_head.forward``, where the student's head is whole.

It takes the student's states (R, D) and head, without gradients, and returns the teacher's states
(R, D') and head.  The head may be the student's.  Backward reads a head of the teacher's own again,
so that one must stay whole until the micro-batch's backward is done.
"""


class TokenOutputs(NamedTuple):
    """What the request computes: (R,) fp32 each, by verl's ``model_output`` names, or None.

    This is a tuple because FSDP2 registers its pre-backward hook, which gathers the weights again,
    on the tensors that it finds in a module's output, and finds them in tuples.
    """

    log_probs: Tensor | None = None
    entropy: Tensor | None = None
    distillation_losses: Tensor | None = None
    student_mass: Tensor | None = None
    teacher_mass: Tensor | None = None
    teacher_log_probs: Tensor | None = None  # of the sampled tokens, under a local teacher


def flag(batch: TensorDict, name: str) -> bool:
    """Read a boolean that verl keeps beside the tensors of a batch; False if it is missing."""
    return bool(tu.get_non_tensor_data(data=batch, key=name, default=False))


def loss_config_of(loss_function: Any) -> DistillationLossConfig | None:
    """Return the distillation loss's settings from the loss function, or None if it has none.

    verl gives its engines no distillation settings.  Its worker binds them into the loss with
    ``functools.partial(distillation_ppo_loss, distillation_config=...)``, which is the only place
    where an engine can find them.
    """
    config = getattr(loss_function, "keywords", {}).get("distillation_config")
    return None if config is None else config.distillation_loss


def has_local_teacher(loss_config: DistillationLossConfig | None) -> bool:
    """Whether the loss's teacher runs in the training process."""
    return loss_config is not None and loss_config.get("teacher", "server") != "server"


def token_request(
    batch: TensorDict,
    placed: PlacedRows,
    loss_config: DistillationLossConfig | None,
    teacher: LocalTeacher | None,
) -> Request:
    """Build the request for the ``TokenOutputs`` of the placed rows.

    Args:
        batch: verl's micro-batch, on the device.
        placed: the rows to compute on this rank.
        loss_config: settings of the distillation loss; None if there is none.
        teacher: a teacher in this process; None if a server teaches, or nobody does.
    """
    rows = placed.rows
    # roll the whole packed batch: a roll of this rank's shard would wrap at the shard's end
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

    def compute(hidden: Tensor, head: LMHead) -> TokenOutputs:
        side = None
        if teacher is not None:
            side = _detached(*teacher(*_detached(hidden, head)))
        return TokenOutputs(
            **token_outputs.token_outputs(hidden, head, ids, teacher=side, **wanted)
        )

    return Request(compute, placed.positions)


def _detached(hidden: Tensor, head: LMHead) -> tuple[Tensor, LMHead]:
    bias = None if head.bias is None else head.bias.detach()
    return hidden.detach(), dataclasses.replace(head, weight=head.weight.detach(), bias=bias)
