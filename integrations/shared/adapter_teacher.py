"""A teacher for a student that trains LoRA: a second adapter on the student's own model.

With ``kind="ema"`` A and B are averaged, each by itself, and their product is not the average of
the products: one step takes a weight's update from B A to ((1 - r) B + r B') ((1 - r) A + r A'),
where A' and B' are the student's and r is the rate.  A copy (``"synced"``, ``sync()``) is exact.

(What is said of PEFT was read in 0.21; it is supported from 0.13 on.)
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from operator import attrgetter
from typing import Any

import torch
from peft import PeftModel, PeftType
from torch import Tensor, nn

from fused_sd import Teacher
from fused_sd.checks import fail
from fused_sd.teaching.parameters import reshard
from fused_sd.teaching.teacher import Kind

ADAPTER = "teacher"


class AdapterTeacher(Teacher):
    """``Teacher`` for LoRA, DoRA and ``modules_to_save``, which shares the student's base weights.

    The teacher is a second adapter, ``"teacher"``, which is never trained.  ``save_pretrained``
    writes it beside the student's, in a folder of its own.  A frozen teacher needs no adapter while
    the student's still changes nothing: it is the model with its adapter switched off.

    Make the teacher before the model is sharded: PEFT adds whole parameters, which FSDP and ZeRO
    then shard like the student's.

    Args:
        student: a PeftModel with one active LoRA adapter, or one inside a wrapper.
        kind, rate, every: as in ``Teacher``.

    Raises:
        ValueError: the adapter cannot be copied, or a setting is out of range.
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
        """Whether the teacher is the model with its adapter switched off."""
        return self.kind == "frozen" and ADAPTER not in self._peft.peft_config

    @contextmanager
    def acting(self) -> Iterator[nn.Module]:
        """Run the teacher as ``Teacher.acting`` does, with its adapter in the student's place."""
        with super().acting() as module:
            if self.kind == "live":
                yield module
                return
            # PEFT's set_adapter and disable_adapter also switch requires_grad: of the adapter that
            # becomes active on, of the others off.  The optimizer would train the teacher.
            with _keeping_trainability(self._peft):
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
        """Copy the student's weights now; a frozen teacher without adapter gets one for them."""
        if self.uses_base:
            self._add_adapter()
        super().sync()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a ``state_dict``; add or delete the teacher's adapter, if the state says so."""
        if self.uses_base and state["weights"]:
            self._add_adapter()
        elif self.kind == "frozen" and not self.uses_base and not state["weights"]:
            self._peft.delete_adapter(ADAPTER)
        super().load_state_dict(state)

    def _weights(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        # the adapters alone: both sides share the base weights
        if self.kind == "live" or self.uses_base:
            return {}, {}
        reshard(self._peft)
        return _adapter_tensors(self._peft, self._name), _adapter_tensors(self._peft, ADAPTER)

    def _add_adapter(self) -> None:
        """Add a copy of the student's adapter to the model."""
        if ADAPTER in self._peft.peft_config:
            fail("student", f"have no adapter {ADAPTER!r}", "one", "delete or rename it")
        _check_whole(self._peft)
        config: Any = copy.deepcopy(self._peft.peft_config[self._name])
        # PiSSA, OLoRA, CorDA and others change the base weight when an adapter is made.  The plain
        # initialisation does not, and the values are replaced below.
        config.init_lora_weights = True
        # Older releases of PEFT freeze or unfreeze other parameters when they add an adapter.
        with _keeping_trainability(self._peft):
            self._peft.add_adapter(ADAPTER, config)
        students, teachers = self._weights()
        for name, teacher in teachers.items():
            # ``data``, not ``copy_``: an adapter may be made in another dtype than the student's
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
    """Make an ``AdapterTeacher`` for a student that trains LoRA, else a ``Teacher``.

    Args:
        student, kind, rate, every, weights: as in ``Teacher``.

    Raises:
        ValueError: as both classes do.
    """
    peft_model = find_peft_model(student)
    if kind != "live" and weights is None and peft_model is not None and _is_lora(peft_model):
        return AdapterTeacher(student, kind=kind, rate=rate, every=every)
    return Teacher(student, kind=kind, rate=rate, every=every, weights=weights)


def find_peft_model(module: nn.Module) -> PeftModel | None:
    """Return the PeftModel inside DDP, FSDP, torch.compile and DeepSpeed's engine, or None."""
    # From ``_modules``, not by ``hasattr``: models answer for attributes of what they hold.
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
    """Refuse a student that a second adapter would not reproduce."""
    remedy = "use Teacher, which copies the whole model"
    if not _is_lora(model):
        fail("student", "train LoRA", str(model.peft_type), remedy)
    if len(model.active_adapters) != 1:
        fail("student", "have one active adapter", model.active_adapters, "activate one of them")
    config: Any = model.peft_config[model.active_adapter]
    # Those biases belong to the base model, which both sides share: training moves the teacher.
    if config.bias != "none":
        fail("student", "leave the base's biases alone", f"bias={config.bias!r}", remedy)
    _check_whole(model)


def _check_whole(model: PeftModel) -> None:
    """Refuse an adapter that is sharded, for PEFT adds whole ones."""
    for name, tensor in _adapter_tensors(model, model.active_adapter).items():
        if tensor.is_meta or tensor.numel() == 0 or hasattr(tensor, "to_local"):
            remedy = "make the teacher earlier, while the model is whole"
            fail("student", "be whole", f"{name} sharded or empty", remedy)


def _adapter_tensors(model: PeftModel, adapter: str) -> dict[str, Tensor]:
    """Return the parameters and buffers of one adapter by name, each tensor once."""
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
    """Yield what each layer holds for an adapter.

    PEFT lists in ``adapter_layer_names`` the attributes in which a layer keeps its adapters by name
    (``lora_A``, ``modules_to_save``).  ``get_peft_model_state_dict`` would go through the whole
    model's ``state_dict``, and loading would have to undo its renaming.

    Yields:
        path: the layer's name.
        container: the attribute's name.
        held: the adapter's module, or its tensor.
    """
    for path, part in model.named_modules():
        # each once: DoRA appends the name of its magnitudes, in some releases for each adapter
        for container in dict.fromkeys(getattr(part, "adapter_layer_names", ())):
            held = attrgetter(container)(part)
            if adapter in held:
                yield path, container, held[adapter]


def _does_nothing(model: PeftModel) -> bool:
    """Return whether the active adapter still changes nothing.

    LoRA's B is zero before training (for embeddings it is A's role); a copy in ``modules_to_save``
    equals its original.  False where it is not known.
    """
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
def _keeping_trainability(model: nn.Module) -> Iterator[None]:
    """Restore each parameter's ``requires_grad`` afterwards; new parameters are left alone."""
    before = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        yield
    finally:
        for parameter, trainable in before:
            if parameter.requires_grad != trainable:
                parameter.requires_grad_(trainable)
