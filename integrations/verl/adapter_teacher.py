"""A teacher for a student that trains LoRA inside verl's FSDP2 engine: values, no second adapter.

The teacher keeps, on each rank, a copy of the shards of what the student trains.  While it runs,
its values stand in the student's parameters.  A second PEFT adapter, as TRL's trainers have, would
cost the same memory and would have to be kept out of everything in verl that goes through the
model's parameters: the optimizer, the checkpoints ("lora_" in a name), and what the rollout engine
is sent (``collect_lora_params``, and the base weights, which are all names without "lora_", so that
a second copy in ``modules_to_save`` would be sent too).  It would also have to exist before FSDP
wraps the model, when nobody has told the engine of any teacher.

Whatever an adapter trains is swapped: A and B, DoRA's magnitudes, ``modules_to_save``, biases.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from verl.utils.device import get_torch_device

from fused_sd import Teacher
from fused_sd.checks import fail
from fused_sd.teaching.parameters import check_same_layout, local_shard, reshard


class SwappedTeacher(Teacher):
    """``Teacher`` whose weights stand in the student's parameters while it runs.

    Only what the student trains is held twice.  The module of the teacher is the student's.  An
    average (``kind="ema"``) is of A and of B, each by itself, as in TRL's trainers, and in fp32.

    Args:
        student: a module that FSDP2 has sharded, of which a part is trained.
        kind: ``"ema"``, ``"synced"`` or ``"frozen"``.
        rate, every: as in ``Teacher``.

    Raises:
        ValueError: nothing is trained, or a setting is out of range; later, what was trained when
            the teacher was made is missing, or has another shape.
    """

    def _prepare(self, weights: nn.Module | None) -> nn.Module:
        self._held: dict[str, Tensor] = {}
        for name, parameter in _sharded_parameters(self._student).items():
            if parameter.requires_grad:
                copy = parameter.detach().clone()
                self._held[name] = copy.float() if self.kind == "ema" else copy
        if not self._held:
            fail("student", "train an adapter", "nothing trained", "set lora_rank")
        return self._student

    @contextmanager
    def acting(self) -> Iterator[nn.Module]:
        """Run the teacher as ``Teacher.acting`` does, with its values in the student's place.

        The parameters are written in place: the student must not run meanwhile, and none of its
        backwards may be outstanding.
        """
        students, teachers = self._weights()
        check_same_layout(students, teachers)
        own = [local_shard(parameter).detach().clone() for parameter in students.values()]
        try:
            _write(students, teachers.values())
            with super().acting() as module:
                yield module
        finally:
            # looked up anew: the first forward may move FSDP2's shards to other memory
            _write(self._weights()[0], own)

    def move(self, device: str) -> None:
        """Move the values that the teacher holds; a student on another device can use them."""
        self._held = {name: tensor.to(device) for name, tensor in self._held.items()}

    def _weights(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        parameters = _sharded_parameters(self._student)
        return {name: parameters[name] for name in self._held if name in parameters}, self._held


@torch.no_grad()
def _sharded_parameters(module: nn.Module) -> dict[str, Tensor]:
    """Return a module's parameters by name, as shards that may be read and written.

    They are looked up each time, because FSDP2 replaces parameters when a module is moved.  Copies
    that FSDP2 has gathered are freed: it keeps the root's after a forward, and everybody's with
    ``reshard_after_forward=False``, and would use them in the next one.
    """
    reshard(module)
    parameters: dict[str, Tensor] = dict(module.named_parameters())
    on_host = any(local_shard(tensor).device.type == "cpu" for tensor in parameters.values())
    if on_host and get_torch_device().is_available():
        # Copies between the host and the GPU may be under way: verl's offloading does not wait for
        # them, and under CPUOffloadPolicy each forward and backward reads pinned shards on its own
        # time.
        get_torch_device().synchronize()
    return parameters


@torch.no_grad()
def _write(parameters: dict[str, Tensor], values: Iterable[Tensor]) -> None:
    """Write this rank's shards of other values into sharded parameters."""
    shards = [local_shard(parameter) for parameter in parameters.values()]
    torch._foreach_copy_(shards, [local_shard(value) for value in values])
