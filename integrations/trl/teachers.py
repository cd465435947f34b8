"""The teacher in a trainer's life: updated after each good step, saved and loaded with it."""

import os
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import TrainerCallback

from fused_sd.teaching.teacher import Kind, Teacher

TEACHER_FILE = "teacher.pt"
KINDS: dict[str, Kind] = {  # of TRL's ``teacher_model_kind``
    "live": "live",
    "base": "frozen",
    "ema": "ema",
    "synced": "synced",
    "trust_region": "frozen",  # its reference; the loss mixes the student in
}


def gradients_are_finite(model: nn.Module) -> Tensor:
    """Whether no gradient of this process holds an infinite or NaN value: () bool."""
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    local = [g.to_local() if isinstance(g, DTensor) else g for g in gradients]
    local = [gradient for gradient in local if gradient.numel()]  # a shard may be empty
    if not local:
        return torch.tensor(True)
    sizes = torch._foreach_norm(local, torch.inf)
    return torch.stack([size.to(local[0].device) for size in sizes]).isfinite().all()


class TeacherCallback(TrainerCallback):
    """Update the teacher after each optimiser step whose gradients were finite.

    The others are left out altogether, as in SDPO's official code: without gradients an optimiser
    changes nothing.
    """

    def __init__(self, teacher: Teacher | None, accelerator: Any, *, skip: bool) -> None:
        self.teacher, self.accelerator, self.skip = teacher, accelerator, skip
        self.finite = True
        self.num_skipped = 0

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        flag = gradients_are_finite(kwargs["model"]).to(self.accelerator.device)
        self.finite = bool(self.accelerator.gather(flag[None]).all())
        if not self.finite and self.skip:
            kwargs["optimizer"].zero_grad()
            self.num_skipped += 1

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.teacher is not None:
            self.teacher.update(finite=self.finite)


def save_teacher(teacher: Teacher, folder: str, *, writes: bool) -> None:
    """Write a teacher's state beside a checkpoint; every process takes part, one writes."""
    state = teacher.state_dict()
    weights = {}
    for name, value in state["weights"].items():
        full = value.full_tensor() if isinstance(value, DTensor) else value
        if writes:
            weights[name] = full.cpu()
    if writes:
        torch.save({**state, "weights": weights}, os.path.join(folder, TEACHER_FILE))


def load_teacher(teacher: Teacher, folder: str) -> None:
    """Read the state that ``save_teacher`` wrote; a checkpoint without one leaves it as it is."""
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
