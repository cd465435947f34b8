"""Which weights teach: the student's own, a frozen copy, a moving average, a copy now and then.

teacher = Teacher(model, kind="ema", rate=0.05)
with teacher.acting() as module:  # no gradient, no dropout
    teacher_hidden = module(...)
optimizer.step()
teacher.update(finite=gradients_were_finite)
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from fused_sd import checks
from fused_sd.checks import fail

KINDS = ("live", "frozen", "ema", "synced")
Kind = Literal["live", "frozen", "ema", "synced"]


class Teacher:
    """The weights that teach, and when they follow the student's.

    Averages are kept in fp32 where the teacher's parameters are of 16 bits: those alone would not
    move at small rates.  DTensors (FSDP2) are averaged shard by shard.

    Args:
        student: the module that is trained.
        kind: ``"live"``: the student itself.  ``"frozen"``: as it was at construction.  ``"ema"``:
            teacher <- (1 - rate) teacher + rate student.  ``"synced"``: a copy, made anew.
        rate: the student's share in an average.
        every: optimiser steps from one average or copy to the next.
        weights: the module that becomes the teacher, sharded as the student is; None: a deep copy
            of the student.  Hooks and wrapped forwards are copied with it, and belong to the copy
            unless they are closures over the student.

    Raises:
        ValueError: a setting is out of range, or the student cannot be copied.
    """

    def __init__(
        self,
        student: nn.Module,
        *,
        kind: Kind = "ema",
        rate: float = 0.05,
        every: int = 1,
        weights: nn.Module | None = None,
    ) -> None:
        checks.check_one_of("kind", kind, KINDS)
        checks.check_unit_interval("rate", rate)
        checks.check_positive_int("every", every)
        self.kind, self.rate, self.every = kind, rate, every
        self.age = 0
        """Optimiser steps since the teacher last took the student's weights or a part of them."""
        self._student = student
        # fp32 averages by name, made when they are first needed: the teacher may be sharded later
        self._masters: dict[str, Tensor] = {}
        self._module = self._prepare(weights)

    def _prepare(self, weights: nn.Module | None) -> nn.Module:
        """The module that teaches."""
        if self.kind == "live":
            if weights is not None:
                fail("weights", 'be None for kind="live"', "a module", "the student teaches itself")
            return self._student
        student = _inner(self._student)
        if weights is None:
            _check_whole(student)
            weights = copy.deepcopy(student)
        own = {id(parameter) for parameter in student.parameters()}
        if any(id(parameter) in own for parameter in weights.parameters()):
            fail("weights", "share no parameter with the student", "one that does", "pass a copy")
        _match(dict(_tensors(student)), dict(_tensors(_inner(weights))))
        return weights.requires_grad_(False).eval()

    @property
    def module(self) -> nn.Module:
        """What to run forward on."""
        return self._module

    @contextmanager
    def acting(self) -> Iterator[nn.Module]:
        """Run the teacher: its weights in place, no gradient, no dropout.  Yields the module."""
        modes = [(part, part.training) for part in self._module.modules()]
        self._module.eval()
        try:
            with torch.no_grad():
                yield self._module
        finally:
            for part, training in modes:
                part.training = training

    def update(self, *, finite: bool = True) -> bool:
        """Follow the student; call it after each optimiser step.

        Args:
            finite: whether the step's gradients were; if not, the step does not count.

        Returns:
            Whether the teacher's weights are others than before.
        """
        if not finite:
            return False
        if self.kind == "live":
            return True
        self.age += 1
        share = {"frozen": 0.0, "ema": self.rate, "synced": 1.0}[self.kind]
        if share == 0 or self.age < self.every:
            return False
        self._take(share)
        return True

    def sync(self) -> None:
        """Copy the student's weights now."""
        if self.kind != "live":
            self._take(1.0)

    @torch.no_grad()
    def _take(self, share: float) -> None:
        students, teachers = self._weights()
        _match(students, teachers)
        for name, student in students.items():
            teacher = teachers[name]
            if teacher.is_meta or teacher.numel() == 0:
                remedy = 'ZeRO-3 allows kind="live" and "frozen"; FSDP2 all of them'
                fail("weights", "be here to follow the student's", f"{name} empty", remedy)
            trained = isinstance(student, nn.Parameter) and student.requires_grad
            averaged = trained and self.kind == "ema"
            master = self._master(name, teacher) if averaged else teacher
            if averaged and share < 1:
                _local(master).lerp_(_local(student).to(master), share)
            elif share == 1 or not isinstance(student, nn.Parameter):
                _local(master).copy_(_local(student))
            if master is not teacher:
                _local(teacher).copy_(_local(master))
        self.age = 0

    def _weights(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Parameters and buffers of student and teacher by name, each tensor once."""
        if self.kind == "live":
            return {}, {}
        both = _inner(self._student), _inner(self._module)
        reshard(*both)
        return dict(_tensors(both[0])), dict(_tensors(both[1]))

    def _master(self, name: str, teacher: Tensor) -> Tensor:
        """What is averaged: the teacher's tensor, or its fp32 master."""
        if torch.finfo(teacher.dtype).bits >= 32:
            return teacher
        if name not in self._masters:
            self._masters[name] = teacher.detach().float()
        return self._masters[name]

    def state_dict(self) -> dict[str, Any]:
        """What ``load_state_dict`` takes: fp32 masters where there are any, else the weights.

        As in a module's, the tensors are the teacher's own.
        """
        weights = {name: tensor.detach() for name, tensor in self._weights()[1].items()}
        return {"kind": self.kind, "age": self.age, "weights": {**weights, **self._masters}}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a ``state_dict``.

        Raises:
            ValueError: it is another kind's or another model's.
        """
        if state["kind"] != self.kind:
            fail("state", f"be of kind {self.kind!r}", repr(state["kind"]), "make that teacher")
        teachers = self._weights()[1]
        _match(state["weights"], teachers, "state")
        self._masters.clear()
        for name, teacher in teachers.items():
            value = state["weights"][name]
            _local(teacher).copy_(_local(value))
            if value.dtype == torch.float32 and value.dtype != teacher.dtype:
                _local(self._master(name, teacher)).copy_(_local(value))
        self.age = int(state["age"])


def reshard(*modules: nn.Module) -> None:
    """Shard again what FSDP2 leaves whole: its root, after a forward without a backward."""
    for part in (part for module in modules for part in module.modules()):
        fsdp: Any = part
        if hasattr(part, "reshard"):
            fsdp.reshard()


def _inner(module: nn.Module) -> nn.Module:
    """The module inside DDP and torch.compile, which prefix names and are not to be copied."""
    # not hasattr: PEFT answers for the model inside it
    while isinstance(module, DistributedDataParallel) or "_orig_mod" in module._modules:
        module = next(module.children())
    return module


def _tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers, each once."""
    yield from module.named_parameters()
    yield from module.named_buffers()


def _check_whole(student: nn.Module) -> None:
    """Refuse what a deep copy would not be a copy of."""
    remedy = "copy it before sharding, or pass weights=, a copy that is prepared as the student is"
    if any(hasattr(part, "reshard") for part in student.modules()):
        fail("student", "be whole to be copied", "FSDP2 modules", remedy)
    for name, tensor in student.named_parameters():
        if tensor.is_meta or tensor.numel() == 0:
            got = "on the meta device" if tensor.is_meta else "empty, as ZeRO-3 leaves it"
            fail("student", "be whole to be copied", f"{name} {got}", remedy)


def _match(
    students: dict[str, Tensor], teachers: dict[str, Tensor], owner: str = "weights"
) -> None:
    """The same names, and tensors that lie alike."""
    if students.keys() != teachers.keys():
        other = min(students.keys() ^ teachers.keys())
        fail(owner, "be those of the same model", f"{other} on one side only", "pass a copy of it")
    for name, student in students.items():
        teacher = teachers[name]
        if _layout(student) != _layout(teacher):
            both = (" ".join(map(str, _layout(tensor))) for tensor in (student, teacher))
            got = f"{name} {' and '.join(both)}"
            fail(owner, "have the shapes and shards of the student's", got, "shard both alike")


def _layout(tensor: Tensor) -> tuple[Any, ...]:
    """Shape, and where it is sharded its placements and mesh."""
    shards = (getattr(tensor, name, None) for name in ("placements", "device_mesh"))
    return tuple(tensor.shape), *(part for part in shards if part is not None)


def _local(tensor: Any) -> Tensor:
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor
