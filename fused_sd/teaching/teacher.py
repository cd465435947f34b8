"""The teacher's weights: the student's own, a frozen copy, a moving average or a periodic copy.

teacher = Teacher(model, kind="ema", rate=0.05)
with teacher.acting() as module:  # no gradient, no dropout
    teacher_hidden = module(...)
optimizer.step()
teacher.update(finite=gradients_were_finite)
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from fused_sd import checks
from fused_sd.checks import fail
from fused_sd.teaching.parameters import (
    check_apart,
    check_same_layout,
    copy_module,
    local_shard,
    named_tensors,
    reshard,
    shard,
    shard_like,
    shard_was_written,
    unwrap,
    whole,
)

Kind = Literal["live", "frozen", "ema", "synced"]


class Teacher:
    """Hold the weights that teach, and let them follow the student's.

    An average of 16-bit parameters is kept in fp32 beside them: in 16 bits a small ``rate`` rounds
    to no change at all.  Parameters that the student has never trained while the teacher followed
    have no average; buffers are copied at every update.

    Args:
        student: the module that is trained, possibly inside DDP, FSDP2, ZeRO-3 or
            ``torch.compile``.
        kind: ``"live"``: the student itself.  ``"frozen"``: the student at construction.
            ``"ema"``: ``teacher <- (1 - rate) teacher + rate student``.  ``"synced"``: a copy that
            is renewed.
        rate: the student's share in an average, in [0, 1].
        every: number of optimiser steps between two averages or copies, at least 1.
        weights: the module to use as the teacher, of the student's structure and sharded as the
            student is.  It stops requiring gradients.  None: a deep copy of the student.  Hooks and
            wrapped forwards come along and use the copy; closures over the student are refused.

    Raises:
        ValueError: a setting is out of range, ``weights`` does not match the student, shares its
            memory or runs its modules, or the student cannot be copied.

    Reference:
        ``"ema"``: https://arxiv.org/abs/2601.20802 (SDPO) and https://arxiv.org/abs/2601.19897
        (SDFT).

    Examples:
        >>> import torch, fused_sd
        >>> student = torch.nn.Linear(2, 2)
        >>> teacher = fused_sd.Teacher(student, kind="ema", rate=0.25)
        >>> before = student.weight.detach().clone()
        >>> with torch.no_grad():
        ...     _ = student.weight.add_(1.0)  # an optimizer's step
        >>> teacher.update()
        True
        >>> (teacher.module.weight - before).allclose(torch.tensor(0.25))
        True
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
        checks.check_one_of("kind", kind, get_args(Kind))
        checks.check_unit_interval("rate", rate)
        checks.check_positive_int("every", every)
        for name, module in (("student", student), ("weights", weights)):
            if not isinstance(module, nn.Module) and (name == "student" or module is not None):
                fail(name, "be a torch.nn.Module", repr(module), "pass a model that is loaded")
        self.kind, self.rate, self.every = kind, rate, every
        self.age = 0
        """Optimiser steps since the teacher's weights last changed."""
        self._student = student
        # fp32 averages by name; made on first use, since the teacher may be sharded until then
        self._masters: dict[str, Tensor] = {}
        self._module = self._prepare(weights)
        self._trained: set[str] = set()
        if kind == "ema":
            self._note_trained(self._weights()[0])

    def _prepare(self, weights: nn.Module | None) -> nn.Module:
        """Return the module that teaches, checked against the student and frozen."""
        if self.kind == "live":
            if weights is not None:
                fail("weights", 'be None for kind="live"', "a module", "the student teaches itself")
            return self._student
        student = unwrap(self._student)
        if weights is None:
            weights = copy_module(student)
        check_apart(weights, student)
        check_same_layout(dict(named_tensors(student)), dict(named_tensors(unwrap(weights))))
        return weights.requires_grad_(False).eval()

    @property
    def module(self) -> nn.Module:
        """The module whose forward is the teacher's; use it through ``acting``."""
        return self._module

    @contextmanager
    def acting(self) -> Iterator[nn.Module]:
        """Yield the teacher's module with gradients and dropout off; restore its modes afterwards.

        Each submodule's mode is restored on its own: part of a live teacher may be in ``eval``.
        """
        modes = [(part, part.training) for part in self._module.modules()]
        self._module.eval()
        try:
            with torch.no_grad():
                yield self._module
        finally:
            for part, training in modes:
                part.training = training

    def update(self, *, finite: bool = True) -> bool:
        """Count an optimiser step and, where it is due, follow the student.

        Call it once after each optimiser step.

        Args:
            finite: whether the step's gradients were finite, as a bool or a tensor of one.  If not,
                trainers skip the step, and so does the teacher.

        Returns:
            Whether the teacher's weights changed.

        Raises:
            ValueError: the weights are not on this rank, or the model's structure changed.
        """
        if isinstance(finite, Tensor) and finite.numel() == 1 and finite.dtype == torch.bool:
            finite = bool(finite)
        checks.check_bool("finite", finite)
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
        """Copy the student's weights now, for every kind but ``"live"``."""
        if self.kind != "live":
            self._take(1.0)

    @torch.no_grad()
    def _take(self, share: float) -> None:
        """Move the teacher by ``share`` of the way to the student."""
        students, teachers = self._weights()
        check_same_layout(students, teachers)
        self._note_trained(students)
        for name, student in students.items():
            teacher = teachers[name]
            if teacher.is_meta or shard(teacher).numel() == 0:
                # two empty tensors would agree for ever, and the teacher would silently stand still
                remedy = "shard the model with FSDP2 or ZeRO-3"
                fail("weights", "be here to follow the student's", f"{name} empty", remedy)
            averaged = self.kind == "ema" and name in self._trained
            master = self._master(name, teacher) if averaged else teacher
            if averaged and share < 1:
                local_shard(master).lerp_(local_shard(student).to(master), share)
            elif share == 1 or not isinstance(student, nn.Parameter):
                local_shard(master).copy_(local_shard(student))
            if master is not teacher:
                local_shard(teacher).copy_(local_shard(master))
            shard_was_written(teacher)
        self.age = 0

    def _note_trained(self, students: dict[str, Tensor]) -> None:
        """Remember which parameters are trained.

        What was trained and is frozen now, for good or for an evaluation, stays in the average.
        """
        for name, student in students.items():
            if isinstance(student, nn.Parameter) and student.requires_grad:
                self._trained.add(name)

    def _weights(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return the student's and the teacher's parameters and buffers by name, none twice."""
        if self.kind == "live":
            return {}, {}
        both = unwrap(self._student), unwrap(self._module)
        reshard(*both)
        return dict(named_tensors(both[0])), dict(named_tensors(both[1]))

    def _master(self, name: str, teacher: Tensor) -> Tensor:
        """Return the tensor that holds the average: the teacher's own, or fp32 for 16 bits."""
        if torch.finfo(teacher.dtype).bits >= 32:
            return teacher
        if name not in self._masters:
            self._masters[name] = shard(teacher).detach().float()
        return self._masters[name]

    def state_dict(self) -> dict[str, Any]:
        """Return kind, age and weights for ``load_state_dict``.

        Weights with an fp32 average are given by it.  As in ``nn.Module.state_dict``, the tensors
        are the teacher's own and not copies.  They are this rank's shards: DTensors under FSDP2,
        flat pieces under ZeRO-3.
        """
        weights = {name: shard(tensor).detach() for name, tensor in self._weights()[1].items()}
        return {"kind": self.kind, "age": self.age, "weights": {**weights, **self._masters}}

    def whole_weights(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the weights of ``state_dict`` by name, each gathered from all ranks.

        All ranks must go through all of them.  One weight at a time is whole.
        """
        held = self.state_dict()["weights"]
        for name, teacher in self._weights()[1].items():
            yield name, whole(held[name], teacher)

    def _check_state(self, state: Any) -> None:
        """Refuse the state of another kind of teacher, or of a module."""
        if not isinstance(state, Mapping):
            fail("state", "be a dict", type(state).__name__, "pass what state_dict returned")
        kind = state.get("kind")
        if kind != self.kind:
            fail("state", f"be of kind {self.kind!r}", repr(kind), "make that teacher")
        checks.check_whole("state['age']", state.get("age"), "pass what state_dict returned")
        weights = state.get("weights")
        if not isinstance(weights, Mapping):
            got = type(weights).__name__
            fail("state['weights']", "be a dict of tensors", got, "pass what state_dict returned")
        for name, value in weights.items():
            if not isinstance(value, Tensor):
                got = f"{name}: {type(value).__name__}"
                fail("state['weights']", "hold tensors", got, "pass what state_dict returned")

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from what ``state_dict`` returned, or from the same with whole weights.

        Raises:
            ValueError: the state is of another kind, model or sharding.
        """
        self._check_state(state)
        teachers = self._weights()[1]
        weights = {
            name: shard_like(value, teachers[name]) if name in teachers else value
            for name, value in state["weights"].items()
        }
        check_same_layout(weights, teachers, "state")
        self._masters.clear()
        for name, teacher in teachers.items():
            value = weights[name]
            local_shard(teacher).copy_(local_shard(value))
            if value.dtype == torch.float32 and value.dtype != teacher.dtype:
                local_shard(self._master(name, teacher)).copy_(local_shard(value))
            shard_was_written(teacher)
        self.age = int(state["age"])
