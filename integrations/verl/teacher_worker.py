"""A worker of the teacher's group: runs a frozen model without its head, and sends the states.

Dimension key:  B samples, L tokens, K counted response tokens of a sample, D' hidden size
"""

from typing import Any

import torch
import transfer_queue as tq
from tensordict import TensorDict
from torch import Tensor, nn
from verl.single_controller.base import Worker
from verl.single_controller.base.decorator import Dispatch, register
from verl.trainer.config import CheckpointConfig
from verl.utils import tensordict_utils as tu
from verl.utils.device import get_device_id
from verl.utils.distributed import initialize_global_process_group_ray, set_numa_affinity
from verl.utils.memory_utils import aggressive_empty_cache
from verl.utils.torch_dtypes import PrecisionType
from verl.workers.config import FSDPEngineConfig, FSDPOptimizerConfig, HFModelConfig

from fused_sd import LMHead
from fused_sd.integrations.shared.completion_scores import with_head
from fused_sd.integrations.transformers import Request
from fused_sd.integrations.verl.engine import FusedSDEngine
from fused_sd.integrations.verl.packed_rows import predicting_rows
from fused_sd.integrations.verl.self_distillation import WorkerGroupConfig
from fused_sd.integrations.verl.teacher_sequences import jagged
from fused_sd.integrations.verl.teacher_states import STATES, send_head

# teacher_batch's columns, by the names under which verl packs a model's inputs
INPUTS = {
    "teacher_input_ids": "input_ids",
    "teacher_position_ids": "position_ids",
    "responses": "responses",
    "response_mask": "response_mask",
}


class FrozenEngine(FusedSDEngine):
    """verl's FSDP2 engine around a model that is never trained.

    ``forward_only`` would say so, but makes verl stream the weights from the CPU in each forward
    (``CPUOffloadPolicy``), which a model with GPUs of its own need not.
    """

    def _build_optimizer(self, module: nn.Module) -> None:
        """Build none."""

    def _build_lr_scheduler(self, optimizer: Any) -> None:
        """Build none."""

    def states(self, batch: TensorDict) -> list[Tensor]:
        """Return the states (K, D') of each sample that predict the tokens in response_mask.

        Every rank must call it as often as the others: forwards of sharded modules are collectives.

        Args:
            batch: jagged ``input_ids``, ``position_ids``, ``responses`` and ``response_mask``.
        """
        tu.assign_non_tensor(
            batch,
            use_remove_padding=self.use_remove_padding,
            use_fused_kernels=True,
            temperature=1.0,
        )
        batch = batch.to(get_device_id())
        rows = predicting_rows(batch)
        found = self.hidden_rows(batch, batch["input_ids"], batch["position_ids"], rows)
        counts = [int((mask != 0).sum()) for mask in batch["response_mask"].unbind()]
        return list(found.split(counts))

    @torch.no_grad()
    def head(self) -> LMHead:
        """Return a copy of the model's head; a collective, as FSDP holds one whole only inside."""
        ids = torch.zeros(1, 2, dtype=torch.int64, device=get_device_id())
        positions = torch.arange(2, device=ids.device)[None]
        request = Request(with_head(outlives_forward=True))
        with self._autocast():
            output = self.module(input_ids=ids, position_ids=positions, fused_sd=request)
        return output.result[1].head


class TeacherWorker(Worker):
    """One process of the teacher's worker group.

    Args:
        model: keywords of verl's ``HFModelConfig``.
        group: the worker group's settings.
        offload: keep the weights on the CPU between two batches, for GPUs that others use too.
    """

    def __init__(self, model: dict[str, Any], group: WorkerGroupConfig, offload: bool) -> None:
        super().__init__()
        initialize_global_process_group_ray()
        set_numa_affinity()
        self.dtype = PrecisionType.to_dtype(group.dtype)
        precision = {"param_dtype": group.dtype, "reduce_dtype": "fp32", "buffer_dtype": "fp32"}
        self.engine = FrozenEngine(
            model_config=HFModelConfig(**model),
            engine_config=FSDPEngineConfig(
                strategy="fsdp2",
                param_offload=offload,
                model_dtype=group.dtype,
                mixed_precision=precision,
                use_torch_compile=False,
            ),
            optimizer_config=FSDPOptimizerConfig(lr=0.0),  # none is built
            checkpoint_config=CheckpointConfig(),
        )

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def init_model(self) -> int:
        """Load the model, send its head, and return D'."""
        self.engine.initialize()
        tq.init()
        with self.engine.eval_mode():
            head = self.engine.head()
        if self.rank == 0:
            send_head(head)
        aggressive_empty_cache(force_sync=True)
        return head.weight.shape[1]

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def write_states(self, forwards: list[list[list[str]]], partition_id: str) -> int:
        """Write the column ``teacher_states`` of samples, forward by forward.

        Args:
            forwards: for each worker the samples' keys, by forward; all have equally many forwards,
                of which some may be empty.
            partition_id: where the samples are.

        Returns:
            The number of bytes that this worker wrote.
        """
        num_bytes = 0
        with self.engine.eval_mode():
            for keys in forwards[self.rank]:
                if not keys:
                    self.engine.states(_nothing())
                    continue
                found = tq.kv_batch_get(
                    keys=keys, partition_id=partition_id, select_fields=list(INPUTS)
                )
                batch = tu.get_tensordict({own: found[name] for name, own in INPUTS.items()})
                states = [one.to("cpu", self.dtype) for one in self.engine.states(batch)]
                num_bytes += sum(one.nbytes for one in states)
                tq.kv_batch_put(
                    keys=keys,
                    partition_id=partition_id,
                    fields=TensorDict({STATES: jagged(states)}, batch_size=len(keys)),
                )
        aggressive_empty_cache(force_sync=True)
        return num_bytes


def _nothing() -> TensorDict:
    """Return a batch that takes part in a forward and asks for no state."""
    two = jagged([torch.arange(2)])
    one = jagged([torch.zeros(1, dtype=torch.int64)])
    inputs = {"input_ids": two, "position_ids": two, "responses": one, "response_mask": one}
    batch: TensorDict = tu.get_tensordict(inputs)
    return batch
