"""Teachers inside the engine: other weights than the student's, on the privileged sequences.

A teacher with weights of its own is a second module, built and sharded as the student is when it is
first needed, from the model that the run started from.

Dimension key:  R rows that are computed, D hidden size
"""

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from tensordict import TensorDict
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from verl.utils.device import get_device_name
from verl.utils.fsdp_utils import load_fsdp_model_to_gpu, offload_fsdp_model_to_cpu

from fused_sd import LMHead
from fused_sd.checks import fail
from fused_sd.integrations.shared.completion_scores import with_head
from fused_sd.integrations.transformers import Request, unwrap
from fused_sd.integrations.verl.config import FusedSDLossConfig
from fused_sd.integrations.verl.engine import FusedSDEngine
from fused_sd.integrations.verl.forward import TeacherSide, flag
from fused_sd.teaching.teacher import Kind, Teacher
from fused_sd.teaching.trust_region import trust_region_states

ADAPTED = ("base_layer", "original_module")  # attributes of PEFT's layers
KINDS: dict[str, Kind] = {"ema": "ema", "synced": "synced", "reference": "frozen"}


class TeachingEngine(FusedSDEngine):
    """``FusedSDEngine`` with every teacher of ``FusedSDLossConfig.teacher``.

    ``"ema"`` and ``"synced"`` follow the student after each optimiser step whose gradient was
    finite, shard by shard, and are saved and loaded with the checkpoint; a checkpoint without one
    makes the teacher a copy of the student that it holds.  ``"reference"`` is the model that the
    run started from; with LoRA it is the model without adapter, and no second copy is made.
    """

    scaler: Any  # verl's, of fp16 gradients
    _teacher: Teacher | None = None
    _loaded: dict[str, Any] | None = None  # a checkpoint's teacher, until there is one

    def prepare_model_inputs(self, micro_batch: TensorDict) -> tuple[dict[str, Any], dict]:
        if flag(micro_batch, "distillation_only") and "self_distillation_mask" in micro_batch:
            micro_batch = micro_batch.copy()
            # rows of samples without a context cost nothing
            micro_batch["response_mask"] = micro_batch["loss_mask"]
        return super().prepare_model_inputs(micro_batch)

    def teacher_rows(self, micro_batch: TensorDict, rows: Tensor) -> TeacherSide:
        config = self._loss_config
        if not isinstance(config, FusedSDLossConfig) or config.teacher == "live":
            return super().teacher_rows(micro_batch, rows)
        keeps = not self._shares_head
        with self._acting(config) as module:
            keeper = _HeadKeeper(module, keeps=keeps)
            states = self._privileged_rows(micro_batch, rows, keeper)
        mix = config.trust_region_mix
        student = self._privileged_rows(micro_batch, rows) if mix else None

        def side(student_states: Tensor, student_head: LMHead) -> tuple[Tensor, LMHead]:
            head = student_head if keeper.head is None else keeper.head
            if student is None:
                return states, head
            return trust_region_states(states, head, student, student_head, mix)

        return side

    def _privileged_rows(
        self, micro_batch: TensorDict, rows: Tensor, module: nn.Module | None = None
    ) -> Tensor:
        ids, positions = micro_batch["teacher_input_ids"], micro_batch["teacher_position_ids"]
        return self.hidden_rows(micro_batch, ids, positions, rows, module)

    @property
    def _shares_head(self) -> bool:
        """Whether the teacher's head is the student's: LoRA elsewhere than on the head."""
        head = unwrap(self.module).get_output_embeddings()
        return self._is_lora and not any(hasattr(head, name) for name in ADAPTED)

    @contextmanager
    def _acting(self, config: FusedSDLossConfig) -> Iterator[nn.Module]:
        if self._is_lora:
            if config.teacher != "reference":
                fail(
                    "distillation_loss.teacher",
                    'be "live" or "reference" with LoRA',
                    repr(config.teacher),
                    "train all weights to have a teacher that follows them",
                )
            with self.disable_adapter():
                yield self.module
            return
        if self._teacher is None:
            self._teacher = self._build_teacher(config)
        with self._teacher.acting() as module:
            yield module

    def _build_teacher(self, config: FusedSDLossConfig) -> Teacher:
        kind = KINDS[config.teacher]
        if kind != "frozen" and self.engine_config.strategy != "fsdp2":
            fail(
                "actor.strategy",
                f'be "fsdp2" for a teacher that follows the student ({config.teacher!r})',
                repr(self.engine_config.strategy),
                'or choose teacher="live" or "reference"',
            )
        scaler = self.scaler
        weights = self._build_fsdp_module(self._build_module())
        self.scaler = scaler  # the building has made another one
        teacher = Teacher(
            self.module,
            kind=kind,
            rate=config.ema_rate,
            every=config.teacher_sync_steps,
            weights=weights,
        )
        if self._loaded is not None:
            teacher.load_state_dict(_sharded_alike(self._loaded, teacher))
            self._loaded = None
        elif kind != "frozen":
            teacher.sync()  # the student may come from a checkpoint
        return teacher

    def optimizer_step(self) -> float:
        grad_norm = super().optimizer_step()
        if self._teacher is not None:
            self._teacher.update(finite=math.isfinite(grad_norm))
        return grad_norm

    def to(
        self, device: str, model: bool = True, optimizer: bool = True, grad: bool = True
    ) -> None:
        super().to(device=device, model=model, optimizer=optimizer, grad=grad)
        if self._teacher is not None and model:
            moves = device == get_device_name()
            move = load_fsdp_model_to_gpu if moves else offload_fsdp_model_to_cpu
            move(self._teacher.module)

    def save_checkpoint(self, local_path: str, *args: Any, **kwargs: Any) -> None:
        super().save_checkpoint(local_path, *args, **kwargs)
        if self._teacher is None or self._teacher.kind == "frozen":
            return
        state = self._teacher.state_dict()
        weights = {name: _local(value).cpu() for name, value in state["weights"].items()}
        os.makedirs(local_path, exist_ok=True)
        torch.save({**state, "weights": weights}, _file(local_path))
        dist.barrier()

    def load_checkpoint(self, local_path: str, *args: Any, **kwargs: Any) -> None:
        found = None
        if os.path.exists(_file(local_path)):
            found = torch.load(_file(local_path), map_location="cpu", weights_only=True)
        super().load_checkpoint(local_path, *args, **kwargs)
        if self._teacher is None:
            self._loaded = found
        elif found is not None:
            self._teacher.load_state_dict(_sharded_alike(found, self._teacher))


class _HeadKeeper(nn.Module):
    """Runs a module, and keeps its head beyond the forward after which it is sharded again."""

    def __init__(self, module: nn.Module, *, keeps: bool) -> None:
        super().__init__()
        self.module, self.keeps, self.training = module, keeps, module.training
        self.head: LMHead | None = None

    def forward(self, *args: Any, fused_sd: Request, **kwargs: Any) -> Any:
        if not self.keeps:
            return self.module(*args, fused_sd=fused_sd, **kwargs)

        def compute(hidden: Tensor, head: LMHead) -> Any:
            states, held = with_head(outlives_forward=True)(hidden, head)
            self.head = held.head
            return fused_sd.compute(states, head)

        request = Request(compute, fused_sd.positions)
        return self.module(*args, fused_sd=request, **kwargs)


def _file(folder: str) -> str:
    """Each rank's, named as verl names a model's."""
    return os.path.join(
        folder, f"teacher_world_size_{dist.get_world_size()}_rank_{dist.get_rank()}.pt"
    )


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _sharded_alike(state: dict[str, Any], teacher: Teacher) -> dict[str, Any]:
    """A saved state, its shards placed as the teacher's are."""
    own = teacher.state_dict()["weights"]
    weights = {}
    for name, value in state["weights"].items():
        like = own.get(name)
        if isinstance(like, DTensor):
            value = DTensor.from_local(
                value.to(like.device),
                like.device_mesh,
                like.placements,
                run_check=False,
                shape=like.shape,
                stride=like.stride(),
            )
        weights[name] = value
    return {**state, "weights": weights}
