"""Teachers with weights other than the student's, inside verl's FSDP engine.

Such a teacher is a second module.  It is built and sharded like the student when it is first
needed, from the checkpoint that the run started from.  With LoRA it is a second set of the
adapter's values instead (``adapter_teacher``).

Dimension key:  R rows that are computed, D hidden size
"""

import math
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal

import torch
import torch.distributed as dist
from tensordict import TensorDict
from torch import Tensor, nn
from verl.utils.device import get_device_name
from verl.utils.fsdp_utils import load_fsdp_model_to_gpu, offload_fsdp_model_to_cpu

from fused_sd import LMHead, Teacher, trust_region_states
from fused_sd.checks import fail
from fused_sd.integrations.shared.completion_scores import with_head
from fused_sd.integrations.transformers import Request, unwrap
from fused_sd.integrations.verl.adapter_teacher import SwappedTeacher
from fused_sd.integrations.verl.config import FusedSDLossConfig
from fused_sd.integrations.verl.engine import FusedSDEngine
from fused_sd.integrations.verl.head_request import LocalTeacher, flag
from fused_sd.integrations.verl.teacher_state import local_state, sharded_state, teacher_file
from fused_sd.integrations.verl.teacher_states import GroupTeacher

PEFT_LAYER_ATTRIBUTES = ("base_layer", "original_module")
"""PEFT's LoRA layers have the first, its fully trained copies (``modules_to_save``) the second."""

TEACHER_KINDS: dict[str, Literal["ema", "synced", "frozen"]] = {
    "ema": "ema",
    "synced": "synced",
    "reference": "frozen",
}
"""``FusedSDLossConfig.teacher`` -> kind of ``fused_sd.Teacher``."""


class TeachingEngine(FusedSDEngine):
    """``FusedSDEngine`` with every teacher of ``FusedSDLossConfig.teacher``.

    ``"ema"`` and ``"synced"`` follow the student, shard by shard, once for each batch of rollouts:
    after all its mini-batches and epochs, unless no step had a finite gradient, as in SDPO's
    official code.  They are saved and loaded with the checkpoint; a run that resumes from a
    checkpoint without a teacher starts its teacher as a copy of the loaded student.
    ``"reference"`` is the model that the run started from, and ``"worker_group"`` is another model
    elsewhere, whose states come with the batch.

    With LoRA no base weight is held twice: ``"ema"`` and ``"synced"`` follow what is trained, and
    ``"reference"`` is the model without its adapter, or with the values of the adapter that the run
    started from (``lora_adapter_path``).
    """

    scaler: Any  # verl's gradient scaler, for fp16
    _teacher: Teacher | None = None
    _loaded: dict[str, Any] | None = None  # a checkpoint's teacher, until the teacher is built
    _bereft: str | None = None  # a loaded checkpoint without a teacher, until one is built
    _start: dict[str, Any] | None = None  # the initial adapter, until the teacher is built
    _num_modes = 0  # train modes that are entered and not left
    _group: GroupTeacher | None = None
    _finite: bool | None = None  # whether a step had a finite gradient; None: there was no step

    def prepare_model_inputs(self, micro_batch: TensorDict) -> tuple[dict[str, Any], dict]:
        if flag(micro_batch, "distillation_only") and "self_distillation_mask" in micro_batch:
            # The trainer clears loss_mask in samples without a context.  predicting_rows reads
            # response_mask; with loss_mask in its place those samples cost nothing.
            micro_batch = micro_batch.copy()
            micro_batch["response_mask"] = micro_batch["loss_mask"]
        return super().prepare_model_inputs(micro_batch)

    def teacher_rows(self, micro_batch: TensorDict, rows: Tensor) -> LocalTeacher:
        """Compute the states of the configured teacher; see ``FusedSDEngine.teacher_rows``."""
        config = self._loss_config
        if not isinstance(config, FusedSDLossConfig) or config.teacher == "live":
            return super().teacher_rows(micro_batch, rows)
        if config.teacher == "worker_group":
            return self._group_teacher.rows(micro_batch, rows)
        keeps_head = not self._shares_head
        with self._teacher_module(config) as module:
            keeper = _HeadKeeper(module, keeps_head=keeps_head)
            states = self._privileged_rows(micro_batch, rows, keeper)
        mix = config.trust_region_mix
        student = self._privileged_rows(micro_batch, rows) if mix else None

        def local_teacher(student_states: Tensor, student_head: LMHead) -> tuple[Tensor, LMHead]:
            head = student_head if keeper.head is None else keeper.head
            if student is None:
                return states, head
            return trust_region_states(states, head, student, student_head, mix)

        return local_teacher

    @property
    def _group_teacher(self) -> GroupTeacher:
        """The head of a teacher in a worker group, and its states in a batch."""
        if self._group is None:
            self._group = GroupTeacher()
        return self._group

    def _privileged_rows(
        self, micro_batch: TensorDict, rows: Tensor, module: nn.Module | None = None
    ) -> Tensor:
        """Compute a module's states (R, D) on the teacher's sequences; None: the student's."""
        ids, positions = micro_batch["teacher_input_ids"], micro_batch["teacher_position_ids"]
        return self.hidden_rows(micro_batch, ids, positions, rows, module)

    @property
    def _shares_head(self) -> bool:
        """Whether the teacher's head is the student's: with LoRA that leaves the head alone."""
        head = unwrap(self.module).get_output_embeddings()
        is_trained = any(parameter.requires_grad for parameter in head.parameters())
        is_adapted = any(hasattr(head, name) for name in PEFT_LAYER_ATTRIBUTES)
        return self._is_lora and not is_trained and not is_adapted

    @property
    def _base_is_start(self) -> bool:
        """Whether the model without its adapter is what the run started from.

        Such a reference is in no checkpoint: one that has a reference started from an adapter.
        """
        if not self._is_lora or self.model_config.lora_adapter_path is not None:
            return False
        return self._teacher is None and self._loaded is None

    @contextmanager
    def _teacher_module(self, config: FusedSDLossConfig) -> Iterator[nn.Module]:
        """Yield the module that teaches, in the state in which it teaches."""
        if config.teacher == "reference" and self._base_is_start:
            with self.disable_adapter():
                yield self.module
            return
        if self._teacher is None:
            self._teacher = self._build_teacher(config)
        with self._teacher.acting() as module:
            yield module

    def _build_teacher(self, config: FusedSDLossConfig) -> Teacher:
        """Build the teacher, and put it where a checkpoint or the student is."""
        kind = TEACHER_KINDS[config.teacher]
        if (kind != "frozen" or self._is_lora) and self.engine_config.strategy != "fsdp2":
            # both ways read FSDP2's DTensors shard by shard; FSDP1 has flat buffers instead
            which, others = "follows the student", 'teacher="live" or "reference"'
            if kind == "frozen":
                which, others = "is an adapter at its start", 'teacher="live"'
            fail(
                "actor.strategy",
                f'be "fsdp2" for a teacher that {which} ({config.teacher!r})',
                repr(self.engine_config.strategy),
                f"or choose {others}",
            )
        make = partial(SwappedTeacher, self.module) if self._is_lora else self._copy_model
        teacher = make(kind=kind, rate=config.ema_rate, every=config.teacher_sync_steps)
        state = self._loaded
        if state is None and kind == "frozen":
            state = self._start
        if state is not None:
            teacher.load_state_dict(sharded_state(state, teacher))
        elif kind != "frozen":
            self._start_as_student(teacher)
        self._loaded = self._start = None
        return teacher

    def _start_as_student(self, teacher: Teacher) -> None:
        """Give a teacher that follows the student the student's weights, loaded ones too."""
        if self._bereft is not None:
            warnings.warn(
                f"the checkpoint {self._bereft} holds no teacher: the teacher starts as its "
                "student is, and not where the saved run's teacher was",
                stacklevel=2,
            )
        self._bereft = None
        teacher.sync()

    def _copy_model(self, **settings: Any) -> Teacher:
        """Build the second module."""
        # _build_fsdp_module also makes a new gradient scaler: keep the one in use, with its scale
        scaler = self.scaler
        weights = self._build_fsdp_module(self._build_module())
        self.scaler = scaler
        return Teacher(self.module, weights=weights, **settings)

    def _build_model_optimizer(self) -> None:
        """Keep the adapter that the run starts from, while it is where verl has put it.

        Later a checkpoint may have been loaded over it.  Whether a reference is going to teach is
        in the loss, which comes with the first batch: a shard in the host's memory is kept.
        """
        super()._build_model_optimizer()
        starts_from_adapter = self._is_lora and self.model_config.lora_adapter_path is not None
        if starts_from_adapter and self.engine_config.strategy == "fsdp2":
            self._start = local_state(SwappedTeacher(self.module, kind="frozen"))

    @contextmanager
    def train_mode(self, **kwargs: Any) -> Iterator[None]:
        """Enter verl's mode; on leaving it, the teacher follows the student.

        verl's worker enters it for a batch of rollouts, and inside of that for each mini-batch.
        """
        with super().train_mode(**kwargs):
            self._num_modes += 1
            try:
                yield
            finally:
                self._num_modes -= 1
            if self._num_modes == 0 and self._finite is not None:
                if self._teacher is not None:
                    self._teacher.update(finite=self._finite)
                self._finite = None

    def optimizer_step(self) -> float:
        grad_norm = super().optimizer_step()
        # verl skips the student's step if the norm is not finite
        self._finite = bool(self._finite) or math.isfinite(grad_norm)
        return grad_norm

    def to(
        self, device: str, model: bool = True, optimizer: bool = True, grad: bool = True
    ) -> None:
        """Move the teacher along: verl empties the GPU with this while the rollout engine runs."""
        super().to(device=device, model=model, optimizer=optimizer, grad=grad)
        if model:
            self._group_teacher.to(device)
        if isinstance(self._teacher, SwappedTeacher) and model:
            self._teacher.move(device)
        elif self._teacher is not None and model:
            is_load = device == get_device_name()
            move = load_fsdp_model_to_gpu if is_load else offload_fsdp_model_to_cpu
            move(self._teacher.module)

    def save_checkpoint(self, local_path: str, *args: Any, **kwargs: Any) -> None:
        """Save this rank's shard of the teacher beside verl's files.

        The model that the run started from is built again from its files, and needs none.
        """
        super().save_checkpoint(local_path, *args, **kwargs)
        state = self._loaded if self._teacher is None else local_state(self._teacher)
        if state is None or (state["kind"] == "frozen" and not self._is_lora):
            return
        os.makedirs(local_path, exist_ok=True)
        torch.save(state, teacher_file(local_path))
        dist.barrier()

    def load_checkpoint(self, local_path: str, *args: Any, **kwargs: Any) -> None:
        super().load_checkpoint(local_path, *args, **kwargs)
        found = None
        if os.path.exists(teacher_file(local_path)):
            found = torch.load(teacher_file(local_path), map_location="cpu", weights_only=True)
        # a teacher that was built before has other weights than the checkpoint's student
        self._bereft = local_path if found is None else None
        if self._teacher is None:
            self._loaded = found
        elif found is not None:
            self._teacher.load_state_dict(sharded_state(found, self._teacher))
        elif self._teacher.kind != "frozen":
            self._start_as_student(self._teacher)


class _HeadKeeper(nn.Module):
    """Runs a module and copies its head, which FSDP shards again after the forward.

    The student's loss needs the teacher's head later, inside the student's own forward.
    """

    def __init__(self, module: nn.Module, *, keeps_head: bool) -> None:
        super().__init__()
        self.module, self.keeps_head, self.training = module, keeps_head, module.training
        self.head: LMHead | None = None

    def forward(self, *args: Any, fused_sd: Request, **kwargs: Any) -> Any:
        if not self.keeps_head:
            return self.module(*args, fused_sd=fused_sd, **kwargs)

        def compute(hidden: Tensor, head: LMHead) -> Any:
            states, held = with_head(outlives_forward=True)(hidden, head)
            self.head = held.head
            return fused_sd.compute(states, head)

        request = Request(compute, fused_sd.positions)
        return self.module(*args, fused_sd=request, **kwargs)
