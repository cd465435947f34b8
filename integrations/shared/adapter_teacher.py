"""A teacher for a student that trains LoRA: a second adapter on the same model, no second copy.

The average of two adapters' A and B is not the average of their products BA: with ``kind="ema"``
the teacher's update of a weight is ((1 - r) B + r B') ((1 - r) A + r A').  A copy (``"synced"``,
``sync()``) is exact.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from operator import attrgetter
from typing import Any

import torch
from peft import PeftModel, PeftType
from torch import Tensor, nn

from fused_sd.checks import fail
from fused_sd.teaching.parameters import reshard
from fused_sd.teaching.teacher import Kind, Teacher

ADAPTER = "teacher"


class AdapterTeacher(Teacher):
    """``Teacher`` for LoRA, DoRA and ``modules_to_save``, with the student's base weights.

    A frozen teacher of an adapter that does nothing yet is the model without adapter.  Every other
    is a second adapter ``"teacher"``, which is never trained; ``save_pretrained`` writes it beside
    the student's, in a folder of its own.  Make it before the model is sharded.

    Args:
        student: a PeftModel with one active LoRA adapter, or one inside a wrapper.
        kind, rate, every: as in ``Teacher``.

    Raises:
        ValueError: the adapter cannot be doubled, or a setting is out of range.
    """

    def __init__(
        self, student: nn.Module, *, kind: Kind = "ema", rate: float = 0.05, every: int = 1
    ) -> None:
        peft_model = find_peft_model(student)
        if peft_model is None:
            fail("student", "hold a PeftModel", type(student).__name__, "use Teacher")
        assert peft_model is not None
        self._peft = peft_model
        super().__init__(student, kind=kind, rate=rate, every=every)

    def _prepare(self, weights: nn.Module | None) -> nn.Module:
        if self.kind != "live":
            _check_adapter(self._peft)
            self._name = self._peft.active_adapter
            if self.kind != "frozen" or not _does_nothing(self._peft):
                self._add_adapter()
        return self._student

    @property
    def uses_base(self) -> bool:
        """Whether the teacher is the model without adapter."""
        return self.kind == "frozen" and ADAPTER not in self._peft.peft_config

    @contextmanager
    def acting(self) -> Iterator[nn.Module]:
        """As ``Teacher.acting``; the student's adapter is active again afterwards."""
        with super().acting() as module:
            if self.kind == "live":
                yield module
                return
            # PEFT makes the parameters of an adapter that it activates trainable
            with _trainable_as_before(self._peft):
                if self.uses_base:
                    with self._peft.disable_adapter():
                        yield module
                    return
                active = self._peft.active_adapter
                self._peft.set_adapter(ADAPTER)
                try:
                    yield module
                finally:
                    self._peft.set_adapter(active)

    def sync(self) -> None:
        """Copy the student's adapter now."""
        if self.uses_base:
            self._add_adapter()
        super().sync()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """As ``Teacher.load_state_dict``; whether the teacher has an adapter is the state's too."""
        if self.uses_base and state["weights"]:
            self._add_adapter()
        elif self.kind == "frozen" and not self.uses_base and not state["weights"]:
            self._peft.delete_adapter(ADAPTER)
        super().load_state_dict(state)

    def _weights(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        if self.kind == "live" or self.uses_base:
            return {}, {}
        reshard(self._peft)
        return _adapter_tensors(self._peft, self._name), _adapter_tensors(self._peft, ADAPTER)

    def _add_adapter(self) -> None:
        """Put a copy of the student's adapter beside it."""
        if ADAPTER in self._peft.peft_config:
            fail("student", f"have no adapter {ADAPTER!r}", "one", "delete or rename it")
        config: Any = copy.deepcopy(self._peft.peft_config[self._name])
        # some initialisations change the base weight; the values are replaced below
        config.init_lora_weights = True
        # only newer releases of PEFT do this themselves
        with _trainable_as_before(self._peft):
            self._peft.add_adapter(ADAPTER, config)
        students, teachers = self._weights()
        for name, teacher in teachers.items():
            teacher.data = students[name].detach().clone()
            teacher.requires_grad_(False)


def make_teacher(
    student: nn.Module,
    *,
    kind: Kind = "ema",
    rate: float = 0.05,
    every: int = 1,
    weights: nn.Module | None = None,
) -> Teacher:
    """The teacher that fits: an adapter for a student that trains LoRA, else a copy.

    Args:
        student, kind, rate, every, weights: as in ``Teacher``.
    """
    peft_model = find_peft_model(student)
    if kind != "live" and weights is None and peft_model is not None and _is_lora(peft_model):
        return AdapterTeacher(student, kind=kind, rate=rate, every=every)
    return Teacher(student, kind=kind, rate=rate, every=every, weights=weights)


def find_peft_model(module: nn.Module) -> PeftModel | None:
    """The PeftModel inside DDP, FSDP, a compiled module and DeepSpeed's engine, if there is one."""
    while not isinstance(module, PeftModel):
        inner = [module._modules.get(name) for name in ("module", "_orig_mod")]
        found = next((part for part in inner if part is not None), None)
        if found is None:
            return None
        module = found
    return module


def _is_lora(model: PeftModel) -> bool:
    return model.peft_type == PeftType.LORA


def _check_adapter(model: PeftModel) -> None:
    """Refuse what a second adapter would not double."""
    remedy = "use Teacher, which copies the whole model"
    if not _is_lora(model):
        fail("student", "train LoRA", str(model.peft_type), remedy)
    if len(model.active_adapters) != 1:
        fail("student", "have one active adapter", model.active_adapters, "activate one of them")
    config: Any = model.peft_config[model.active_adapter]
    if config.bias != "none":
        fail("student", "leave the base's biases alone", f"bias={config.bias!r}", remedy)
    for name, tensor in _adapter_tensors(model, model.active_adapter).items():
        if tensor.is_meta or tensor.numel() == 0 or hasattr(tensor, "to_local"):
            fail("student", "be whole", f"{name} sharded or empty", "make the teacher earlier")


def _adapter_tensors(model: PeftModel, adapter: str) -> dict[str, Tensor]:
    """Parameters and buffers of one adapter by name, each once."""
    found: dict[str, Tensor] = {}
    for path, container, held in _containers(model, adapter):
        tensors = {"": held}
        if isinstance(held, nn.Module):
            tensors = {**dict(held.named_parameters()), **dict(held.named_buffers())}
        known = {id(tensor) for tensor in found.values()}
        for name, tensor in tensors.items():
            if id(tensor) not in known:
                found[f"{path}.{container}.{name}"] = tensor
    return found


def _containers(model: PeftModel, adapter: str) -> Iterator[tuple[str, str, Any]]:
    """What each layer holds for an adapter: its module's path, what it is, a module or tensor."""
    for path, part in model.named_modules():
        # DoRA names its magnitudes a second time
        for container in dict.fromkeys(getattr(part, "adapter_layer_names", ())):
            held = attrgetter(container)(part)
            if adapter in held:
                yield path, container, held[adapter]


def _does_nothing(model: PeftModel) -> bool:
    """Whether the active adapter is still the identity; False where that is not seen at once."""
    for path, container, held in _containers(model, model.active_adapter):
        layer: Any = model.get_submodule(path)
        if container in ("lora_A", "lora_embedding_B"):
            continue
        if container == "lora_B":
            same = all(not tensor.any() for tensor in held.parameters())
        elif container == "lora_embedding_A":
            same = not held.any()
        elif container == "modules_to_save":
            values = held.state_dict(), layer.original_module.state_dict()
            same = all(torch.equal(values[0][name], values[1][name]) for name in values[0])
        else:
            same = False
        if not same:
            return False
    return True


@contextmanager
def _trainable_as_before(model: nn.Module) -> Iterator[None]:
    """Parameters leave as trainable as they came; new ones are left alone."""
    before = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        yield
    finally:
        for parameter, trainable in before:
            if parameter.requires_grad != trainable:
                parameter.requires_grad_(trainable)
