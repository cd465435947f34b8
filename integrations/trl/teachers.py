"""The teacher in a trainer: it is updated after each good step, saved and loaded.

(What is said of Trainer was read in transformers 5.24.)
"""

import os
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import TrainerCallback

from fused_sd import Teacher
from fused_sd.integrations.transformers import unwrap
from fused_sd.teaching.teacher import Kind

TEACHER_FILE = "teacher.pt"
KINDS: dict[str, Kind] = {  # by ``teacher_model_kind``
    "live": "live",
    "base": "frozen",
    "ema": "ema",
    "synced": "synced",
    "trust_region": "frozen",  # the reference; DivergenceTrainer mixes the student in
}


def teacher_head_is_resharded(trainer: Any, teacher: nn.Module, student: nn.Module) -> bool:
    """Return whether the teacher's head must be copied to be whole in the student's forward.

    Args:
        trainer: a transformers Trainer, which knows whether parameters are sharded.
        teacher, student: models, wrapped or not.
    """
    is_sharded = trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled
    return is_sharded and unwrap(teacher) is not unwrap(student)


def gradients_are_finite(model: nn.Module) -> Tensor:
    """Return whether no gradient of this process holds an infinite or NaN value: () bool."""
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    local = [g.to_local() if isinstance(g, DTensor) else g for g in gradients]
    local = [gradient for gradient in local if gradient.numel()]  # a shard may be empty
    if not local:
        return torch.tensor(True)
    # one fused call instead of a kernel for each parameter
    sizes = torch._foreach_norm(local, torch.inf)
    return torch.stack([size.to(local[0].device) for size in sizes]).isfinite().all()


class TeacherCallback(TrainerCallback):
    """Updates the teacher after each optimizer step whose gradients were finite.

    Steps with an infinite or NaN gradient are left out, as in SDPO's official code.  Trainer offers
    no way to skip a step, but its ``on_pre_optimizer_step`` comes after clipping and right before
    ``optimizer.step()``: gradients that are removed there change no parameter and no moment.

    Args:
        teacher: the teacher to update, or None.
        accelerator: accelerate's, to agree with the other processes.
        skip: whether to leave such steps out.
    """

    def __init__(self, teacher: Teacher | None, accelerator: Any, *, skip: bool) -> None:
        self.teacher, self.accelerator, self.skip = teacher, accelerator, skip
        self.finite = True
        self.num_skipped = 0

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        flag = gradients_are_finite(kwargs["model"]).to(self.accelerator.device)
        # Sharded gradients may be bad on one process only, and all have to skip the same steps.
        self.finite = bool(self.accelerator.gather(flag[None]).all())
        if not self.finite and self.skip:
            kwargs["optimizer"].zero_grad()
            self.num_skipped += 1

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.teacher is not None:
            self.teacher.update(finite=self.finite)


def save_teacher(teacher: Teacher, folder: str, *, writes: bool) -> None:
    """Write a teacher's state into a checkpoint's folder.

    All processes have to call it, because gathering a shard is collective.

    Args:
        writes: whether this process writes.
    """
    state = teacher.state_dict()
    weights = {}
    for name, value in state["weights"].items():
        full = value.full_tensor() if isinstance(value, DTensor) else value
        if writes:
            weights[name] = full.cpu()
    if writes:
        torch.save({**state, "weights": weights}, os.path.join(folder, TEACHER_FILE))


def load_teacher(teacher: Teacher, folder: str) -> None:
    """Load the state that ``save_teacher`` wrote.

    A checkpoint without one, as TRL's own trainers write, leaves the teacher as it is.
    """
    path = os.path.join(folder, TEACHER_FILE)
    if not os.path.exists(path):
        return
    state = torch.load(path, map_location="cpu", weights_only=True)
    held = teacher.state_dict()["weights"]
    for name, value in state["weights"].items():
        own = held.get(name)
        if isinstance(own, DTensor):
            shards = distribute_tensor(value.to(own.device), own.device_mesh, own.placements)
            state["weights"][name] = shards
    teacher.load_state_dict(state)
