"""verl's FSDP engine with the losses inside ``lm_head.forward``.

The model is asked by ``fused_sd.integrations.transformers.attach``, which changes this one model
and not its class.  Only there is the head's weight whole under FSDP2, whether tied to the
embeddings or a unit of its own, and only then do FSDP's hooks fire again before backward.

Dimension key:  B sequences, N packed rows, R rows that are computed, D hidden size
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor, nn
from verl.utils import tensordict_utils as tu
from verl.utils.device import get_device_name
from verl.utils.model import extract_multi_modal_inputs
from verl.workers.config import DistillationLossConfig
from verl.workers.engine.fsdp.transformer_impl import FSDPEngineWithLMHead

from fused_sd.checks import fail
from fused_sd.integrations.transformers import Request, attach, hidden_states
from fused_sd.integrations.verl import VENDOR
from fused_sd.integrations.verl.forward import (
    TeacherSide,
    flag,
    has_local_teacher,
    loss_config_of,
    score_request,
)
from fused_sd.integrations.verl.rows import Placed, Shard, moved_rows, predicting_rows

PLACED = "fused_sd_placed"  # among verl's output_args: what is needed to read the answer


class FusedSDEngine(FSDPEngineWithLMHead):
    """Computes the distillation loss, log-probabilities and entropy without the logits.

    Where ``fused_kernel_options.impl_backend`` is not ``"fused_sd"`` or ``use_fused_kernels`` is
    off, it is verl's own engine.  With them

    * ``model_output`` has what verl's eager path puts there, as jagged tensors like ``input_ids``;
      rows that predict no counted response token (``response_mask`` 0, prompts) cost nothing and
      are 0 in it;
    * the temperature is one number for the micro-batch, as verl's fused kernels have it;
    * nothing is different for a micro-batch or a rank without such rows: it takes part in each
      collective, with gradient exactly 0.

    FSDP2 is tested on CPUs; FSDP1 runs on accelerators alone and has not been run.
    """

    _loss_config: DistillationLossConfig | None = None  # of the running forward_step

    def _build_fsdp_module(self, module: nn.Module) -> nn.Module:
        wrapped = super()._build_fsdp_module(module)
        if self.is_fused:
            # on the sharded model, so that every rank checks itself on its first micro-batch
            attach(wrapped)
        return wrapped

    @property
    def is_fused(self) -> bool:
        """Whether this engine's configuration asks for fused_sd."""
        options = self.model_config.fused_kernel_options or {}
        return bool(self.model_config.use_fused_kernels) and options.get("impl_backend") == VENDOR

    def forward_step(self, micro_batch: TensorDict, loss_function: Any, forward_only: bool) -> Any:
        self._loss_config = loss_config_of(loss_function)
        try:
            return super().forward_step(micro_batch, loss_function, forward_only)
        finally:
            self._loss_config = None

    def prepare_model_inputs(self, micro_batch: TensorDict) -> tuple[dict[str, Any], dict]:
        inputs, output_args = super().prepare_model_inputs(micro_batch)
        if not (self.is_fused and flag(micro_batch, "use_fused_kernels")):
            return inputs, output_args
        if flag(micro_batch, "calculate_sum_pi_squared"):
            fail(
                "calculate_sum_pi_squared",
                "be off with impl_backend='fused_sd', which makes no logits",
                True,
                "choose another advantage estimator, or use_fused_kernels=False",
            )
        placed = self._place(micro_batch, output_args, predicting_rows(micro_batch))
        teacher = None
        if has_local_teacher(self._loss_config) and "teacher_input_ids" in micro_batch:
            offsets = micro_batch["teacher_input_ids"].offsets()
            there = moved_rows(placed.rows, micro_batch["input_ids"].offsets(), offsets)
            teacher = self.teacher_rows(micro_batch, there)
        for name in ("temperature", "shift_labels", "return_dict"):  # of verl's fused forwards
            inputs.pop(name, None)
        inputs["fused_sd"] = score_request(micro_batch, placed, self._loss_config, teacher)
        output_args[PLACED] = placed
        return inputs, output_args

    def prepare_model_outputs(
        self, output: Any, output_args: dict, micro_batch: TensorDict, logits_processor_func: Any
    ) -> dict[str, Tensor]:
        placed = output_args.get(PLACED)
        if placed is None:
            return super().prepare_model_outputs(
                output, output_args, micro_batch, logits_processor_func
            )
        terms = output.result._asdict().items()
        return {name: placed.nested(values) for name, values in terms if values is not None}

    def teacher_rows(self, micro_batch: TensorDict, rows: Tensor) -> TeacherSide:
        """A local teacher's states beside the student's rows; here the student is its own teacher.

        Called in ``forward_step``, before the student's forward, where the loss's teacher is in
        this process and the micro-batch has ``teacher_input_ids`` (jagged, one privileged sequence
        a sample, ending with the same response as ``input_ids``) and ``teacher_position_ids``.
        Another teacher overrides this method: it takes states from ``hidden_rows``, also of
        another module, and returns them with their head.  All ranks have to run the same forwards
        in it, with or without rows.

        Args:
            micro_batch: on the device.
            rows: (R,) int64 rows of the packed privileged batch; each predicts the same token as
                the student's row of that index.
        """
        states = self.hidden_rows(
            micro_batch,
            micro_batch["teacher_input_ids"],
            micro_batch["teacher_position_ids"],
            rows,
        )
        return lambda student_states, student_head: (states, student_head)

    @torch.no_grad()
    def hidden_rows(
        self,
        micro_batch: TensorDict,
        input_ids: Tensor,
        position_ids: Tensor,
        rows: Tensor,
        module: nn.Module | None = None,
    ) -> Tensor:
        """States that enter the head, of other sequences than the micro-batch's own.

        Runs in evaluation mode, without a gradient, packed, padded and sharded as verl does it.

        Args:
            micro_batch: whose settings hold.
            input_ids, position_ids: jagged, (B, *).
            rows: (R,) rows of the packed sequences; they may differ among the ranks of a sequence
                parallel group.
            module: what runs instead of the engine's module; attached to as that is.

        Returns:
            (R, D) in the dtype in which they enter the head.
        """
        module = self.module if module is None else module
        if extract_multi_modal_inputs(micro_batch.get("multi_modal_inputs", [])):
            fail(
                "teacher_input_ids",
                "come without multi_modal_inputs",
                "both",
                "distil from a teacher server",
            )
        other = micro_batch.copy()
        other["input_ids"], other["position_ids"] = input_ids, position_ids
        inputs, output_args = super().prepare_model_inputs(other)
        for name in ("temperature", "shift_labels", "return_dict"):
            inputs.pop(name, None)
        placed = self._place(other, output_args, rows)
        sliced = self.use_ulysses_sp
        # a row may be on another rank of the group: all of them are gathered there
        request = Request(hidden_states, None if sliced else placed.positions)
        was_training = module.training
        module.eval()
        try:
            with self._autocast():
                states = module(**inputs, use_cache=False, fused_sd=request).result
        finally:
            module.train(was_training)
        return placed.gather(states[0])[rows] if sliced else states

    def _place(self, batch: TensorDict, output_args: dict, rows: Tensor) -> Placed:
        """Where packed rows of a batch are in what the forward on this rank returns."""
        offsets = batch["input_ids"].offsets()
        num_rows = len(batch["input_ids"].values())
        if not tu.get_non_tensor_data(data=batch, key="use_remove_padding", default=True):
            width = int(offsets.diff().max())
            return Placed(Shard(offsets, 0, num_rows, width), rows, lambda values: values)
        pad_size = output_args["pad_size"]
        num_rows = (num_rows + pad_size) // self.ulysses_sequence_parallel_size
        rank = 0
        if self.ulysses_device_mesh is not None:
            rank = self.ulysses_device_mesh["sp"].get_local_rank()
        shard = Shard(offsets, rank * num_rows, num_rows)
        return Placed(
            shard, shard.owned(rows), lambda values: self._gather_and_unpad_packed(values, pad_size)
        )

    def _autocast(self) -> AbstractContextManager[Any]:
        """As verl's ``forward_step`` runs the model."""
        if self._autocast_dtype == torch.float32:
            return nullcontext()
        return torch.autocast(device_type=get_device_name(), dtype=self._autocast_dtype)
