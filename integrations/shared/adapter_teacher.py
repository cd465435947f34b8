"""A teacher for a student that trains LoRA: a second adapter on the student's own model.

With ``kind="ema"`` A and B are averaged, each by itself, and their product is not the average of
the products: one step takes a weight's update from B A to ((1 - r) B + r B') ((1 - r) A + r A'),
where A' and B' are the student's and r is the rate.  A copy (``"synced"``, ``sync()``) is exact.

(What is said of PEFT was read in 0.21; it is supported from 0.13 on.)
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from peft import PeftModel, PeftType
from torch import Tensor, nn

from fused_sd import Teacher
from fused_sd.checks import fail
from fused_sd.integrations.shared.adapter_layers import (
    adapter_tensors,
    changes_nothing,
    copy_adapter,
)
from fused_sd.teaching.parameters import reshard
from fused_sd.teaching.teacher import Kind

ADAPTER = "teacher"
WHOLE_COPY = "use Teacher, which copies the whole model"


class AdapterTeacher(Teacher):
    """``Teacher`` for LoRA, DoRA and ``modules_to_save``, which shares the student's base weights.

    The teacher is a copy of the student's adapter, never trained and named ``"teacher"``; where an
    adapter has that name already, as after an earlier training of this model, ``"teacher_2"`` and
    so on.  It stays in the model, and ``save_pretrained`` writes it beside the student's, in a
    folder of its own, until ``model.delete_adapter`` removes it.  A frozen teacher needs no adapter
    while the student's still changes nothing: it is the model with its adapter switched off.

    Make the teacher before the model is sharded: its whole parameters are then sharded like the
    student's by FSDP and ZeRO.

    Args:
        student: a PeftModel with one active LoRA adapter, or one inside a wrapper.
        kind, rate, every: as in ``Teacher``.

    Raises:
        ValueError: the adapter is not all that is trained, is merged or sharded, or a setting is
            out of range; later, the student's or the teacher's adapter was switched or deleted.

    Examples:
        >>> from peft import LoraConfig, get_peft_model
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> config = GPT2Config(vocab_size=64, n_embd=16, n_layer=1, n_head=2)
        >>> model = GPT2LMHeadModel(config).eval()
        >>> from fused_sd.integrations.adapter_teacher import AdapterTeacher
        >>> lora = LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True)
        >>> student = get_peft_model(model, lora)
        >>> teacher = AdapterTeacher(student, kind="ema", rate=0.05)
        >>> with teacher.acting() as module:  # the student's model, with another adapter
        ...     print(module is student, module.active_adapter)
        True teacher
    """

    def __init__(
        self, student: nn.Module, *, kind: Kind = "ema", rate: float = 0.05, every: int = 1
    ) -> None:
        peft_model = find_peft_model(student) if isinstance(student, nn.Module) else None
        if peft_model is None:
            fail("student", "hold a PeftModel", type(student).__name__, "use Teacher")
        assert peft_model is not None
        self._peft = peft_model
        self._own: str | None = None  # the name of the teacher's adapter
        super().__init__(student, kind=kind, rate=rate, every=every)

    def _prepare(self, weights: nn.Module | None) -> nn.Module:
        if self.kind != "live":
            self._name = _check_student(self._peft)
            if self.kind != "frozen" or not changes_nothing(self._peft, self._name):
                self._own = copy_adapter(self._peft, self._name, ADAPTER)
        return self._student

    @property
    def uses_base(self) -> bool:
        """Whether the teacher is the model with its adapter switched off."""
        return self.kind == "frozen" and self._own is None

    @contextmanager
    def acting(self) -> Iterator[nn.Module]:
        """Run the teacher as ``Teacher.acting`` does, with its adapter in the student's place."""
        with super().acting() as module:
            if self.kind == "live":
                yield module
                return
            self._check_adapters()
            # PEFT's set_adapter and disable_adapter also switch requires_grad: of the adapter that
            # becomes active on, of the others off.  The optimizer would train the teacher.
            with _keeping_trainability(self._peft):
                if self._own is None:
                    with self._peft.disable_adapter():
                        yield module
                    return
                # Callers who set adapters by ``base_model`` leave the outer attribute as it was.
                outer = self._peft.active_adapter
                self._peft.set_adapter(self._own)
                try:
                    yield module
                finally:
                    self._peft.set_adapter(self._name)
                    self._peft.active_adapter = outer

    def sync(self) -> None:
        """Copy the student's weights now; a frozen teacher without adapter gets one for them."""
        if self.uses_base:
            self._own = copy_adapter(self._peft, self._name, ADAPTER)
        super().sync()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a ``state_dict``; add or delete the teacher's adapter, if the state says so."""
        self._check_state(state)
        if self.uses_base and state["weights"]:
            self._own = copy_adapter(self._peft, self._name, ADAPTER)
            try:
                super().load_state_dict(state)
            except ValueError:  # of another model: the student is left as it was
                self._peft.delete_adapter(self._own)
                self._own = None
                raise
            return
        if self.kind == "frozen" and self._own is not None and not state["weights"]:
            self._peft.delete_adapter(self._own)
            self._own = None
        super().load_state_dict(state)

    def _weights(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        # the adapters alone: both sides share the base weights
        if self.kind == "live" or self._own is None:
            return {}, {}
        self._check_adapters()
        reshard(self._peft)
        return adapter_tensors(self._peft, self._name), adapter_tensors(self._peft, self._own)

    def _check_adapters(self) -> None:
        """Refuse a model whose adapters have been switched, merged or deleted meanwhile."""
        _check_unmerged(self._peft)
        if self._peft.active_adapters != [self._name]:
            rule = f"have its adapter {self._name!r} active, which the teacher was made of"
            remedy = "call set_adapter, or make a new teacher"
            fail("student", rule, self._peft.active_adapters, remedy)
        if self._own is not None and self._own not in self._peft.peft_config:
            fail("student", f"hold {self._own!r}", "deleted", "make a new teacher")


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

    Examples:
        >>> from peft import LoraConfig, get_peft_model
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> config = GPT2Config(vocab_size=64, n_embd=16, n_layer=1, n_head=2)
        >>> model = GPT2LMHeadModel(config).eval()
        >>> from fused_sd.integrations.adapter_teacher import make_teacher
        >>> type(make_teacher(model)).__name__
        'Teacher'
        >>> lora = LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True)
        >>> type(make_teacher(get_peft_model(model, lora))).__name__
        'AdapterTeacher'
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


def _check_student(model: PeftModel) -> str:
    """Refuse a student whose adapter's copy would not be the student; return the adapter's name."""
    if not _is_lora(model):
        fail("student", "train LoRA", str(model.peft_type), WHOLE_COPY)
    if len(model.active_adapters) != 1:
        fail("student", "have one active adapter", model.active_adapters, "activate one of them")
    _check_unmerged(model)
    name = model.active_adapters[0]
    own = {id(tensor) for tensor in adapter_tensors(model, name).values()}
    for path, parameter in model.named_parameters():
        # Both sides share what no adapter holds, as the biases of LoraConfig(bias="all"): training
        # it moves the teacher.
        if parameter.requires_grad and id(parameter) not in own:
            remedy = f"freeze it, name it in modules_to_save, or {WHOLE_COPY}"
            fail("student", f"train its adapter {name!r} alone", f"{path} trained too", remedy)
    _check_whole(model, name)
    return name


def _check_unmerged(model: PeftModel) -> None:
    """Refuse merged adapters, which act whichever adapter is active."""
    for path, part in model.named_modules():
        merged = getattr(part, "merged_adapters", None)
        if merged:
            got = f"{', '.join(merged)} merged into {path}"
            fail("student", "have no merged adapter", got, "call unmerge_adapter() first")


def _check_whole(model: PeftModel, adapter: str) -> None:
    """Refuse an adapter that is sharded: whole copies are made."""
    for name, tensor in adapter_tensors(model, adapter).items():
        if tensor.is_meta or tensor.numel() == 0 or hasattr(tensor, "to_local"):
            remedy = "make the teacher earlier, while the model is whole"
            fail("student", "be whole", f"{name} sharded or empty", remedy)


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
