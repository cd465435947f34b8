"""verl's FSDP engine with the losses computed inside ``lm_head.forward``.

``fused_sd.integrations.transformers.attach`` gives this one model a forward that answers requests;
verl's own fused kernels replace the forward of the model's class, for the rest of the process.

The losses run inside the forward of ``lm_head`` because FSDP2 holds a weight whole only while its
module's forward runs.  verl wraps an untied ``lm_head`` as an FSDP unit of its own
(``_select_fsdp2_wrap_targets``), so a model's forward that reads ``lm_head.weight`` without calling
the module gets a sharded DTensor, and its product with a plain tensor fails, as it does in verl's
own fused forward.  A call also lets FSDP gather the weight again before backward and reduce its
gradient afterwards.

Dimension key:  B sequences, N packed rows, R rows that are computed, D hidden size
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor, nn
from verl.utils import tensordict_utils as tu
from verl.utils.device import get_device_name
from verl.workers.config import DistillationLossConfig
from verl.workers.engine.fsdp.transformer_impl import FSDPEngineWithLMHead

from fused_sd.checks import fail
from fused_sd.integrations.transformers import Request, attach, hidden_states, unwrap
from fused_sd.integrations.verl import VENDOR
from fused_sd.integrations.verl.head_request import (
    LocalTeacher,
    flag,
    has_local_teacher,
    loss_config_of,
    token_request,
)
from fused_sd.integrations.verl.packed_rows import (
    PlacedRows,
    Shard,
    matching_rows,
    predicting_rows,
    verls_positions,
)
from fused_sd.integrations.verl.vision_models import mend_vision

PLACED = "fused_sd_placed"  # key in verl's output_args, which travel from inputs to outputs


class FusedSDEngine(FSDPEngineWithLMHead):
    """Computes the distillation loss, log-probabilities and entropy without the logits.

    It is verl's own engine unless ``use_fused_kernels`` is on and
    ``fused_kernel_options.impl_backend`` is ``"fused_sd"``.  With both

    * ``model_output`` holds what verl's eager path puts there, as jagged tensors shaped like
      ``input_ids``.  Rows that predict no counted response token (prompts, ``response_mask`` 0)
      cost nothing and are 0;
    * the temperature is one number for the micro-batch, as with verl's fused kernels;
    * a micro-batch or a rank without any such row still takes part in every collective, with a
      gradient of exactly 0.

    FSDP2 is tested on CPUs.  FSDP1 needs an accelerator and has not been run.
    """

    _loss_config: DistillationLossConfig | None = None  # set while forward_step runs

    def _build_fsdp_module(self, module: nn.Module) -> nn.Module:
        wrapped = super()._build_fsdp_module(module)
        if self.is_fused:
            mend_vision(unwrap(wrapped))
            # After sharding, attach puts its self-check off to the first request, which all ranks
            # run together.  Before, only rank 0 may have the weights: verl builds untied models on
            # the meta device elsewhere.
            attach(wrapped)
        return wrapped

    @property
    def is_fused(self) -> bool:
        """Whether the configuration asks for fused_sd.

        verl 0.9.1 takes any ``impl_backend``: one that it does not know makes it skip its own
        monkey patch (``apply_monkey_patch``), which leaves the name free for us.
        """
        options = self.model_config.fused_kernel_options or {}
        return bool(self.model_config.use_fused_kernels) and options.get("impl_backend") == VENDOR

    def forward_step(self, micro_batch: TensorDict, loss_function: Any, forward_only: bool) -> Any:
        # verl calls prepare_model_inputs without the loss, whose settings are needed there
        self._loss_config = loss_config_of(loss_function)
        try:
            return super().forward_step(micro_batch, loss_function, forward_only)
        finally:
            self._loss_config = None

    def prepare_model_inputs(self, micro_batch: TensorDict) -> tuple[dict[str, Any], dict]:
        """Add the request to verl's inputs, which become the keywords of the model's forward."""
        inputs, output_args = super().prepare_model_inputs(micro_batch)
        if not (self.is_fused and flag(micro_batch, "use_fused_kernels")):
            return inputs, output_args
        if flag(micro_batch, "calculate_sum_pi_squared"):
            # verl refuses this in prepare_model_outputs, which is overridden below
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
            rows = matching_rows(placed.rows, micro_batch["input_ids"].offsets(), offsets)
            teacher = self.teacher_rows(micro_batch, rows)
        _drop_fused_arguments(inputs)
        inputs["fused_sd"] = token_request(micro_batch, placed, self._loss_config, teacher)
        output_args[PLACED] = placed
        return inputs, output_args

    def prepare_model_outputs(
        self, output: Any, output_args: dict, micro_batch: TensorDict, logits_processor_func: Any
    ) -> dict[str, Tensor]:
        """Turn the request's result into verl's ``model_output``."""
        placed = output_args.get(PLACED)
        if placed is None:
            return super().prepare_model_outputs(
                output, output_args, micro_batch, logits_processor_func
            )
        found = output.result._asdict().items()
        return {name: placed.to_jagged(values) for name, values in found if values is not None}

    def teacher_rows(self, micro_batch: TensorDict, rows: Tensor) -> LocalTeacher:
        """Prepare the teacher's states beside the student's; here the student teaches itself.

        ``forward_step`` calls this before the student's forward, if the loss's teacher is in this
        process and the micro-batch has ``teacher_input_ids`` (jagged, one privileged sequence a
        sample, which ends with the same response as ``input_ids``) and ``teacher_position_ids``.

        A subclass with another teacher overrides this method.  It gets the states from
        ``hidden_rows``, which can run another module, and returns them with that module's head.
        Every rank must run the same forwards in it, also a rank without rows: forwards of sharded
        modules are collectives.

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
        """Compute the states that enter the head, for sequences other than the micro-batch's own.

        The forward runs in evaluation mode without a gradient.  verl's own code packs, pads and
        shards the sequences.

        Args:
            micro_batch: supplies the settings, and the pixels of images and videos, which all the
                sequences must have as the micro-batch's own have them.
            input_ids: jagged (B, L).
            position_ids: jagged (B, L), or (B, L, 4) for M-RoPE.
            rows: (R,) rows of the packed sequences; the ranks of a sequence-parallel group may ask
                for different ones.
            module: runs instead of the engine's module; ``attach`` was called on it, too.

        Returns:
            (R, D) in the dtype in which they enter the head.
        """
        module = self.module if module is None else module
        other = micro_batch.copy()
        other["input_ids"], other["position_ids"] = input_ids, verls_positions(position_ids)
        inputs, output_args = super().prepare_model_inputs(other)
        _drop_fused_arguments(inputs)
        placed = self._place(other, output_args, rows)
        # Under Ulysses a wanted row may be on another rank of the group, because student and
        # teacher sequences differ in length: compute all local rows, gather, then select.
        sharded = self.use_ulysses_sp
        request = Request(hidden_states, None if sharded else placed.positions)
        was_training = module.training
        module.eval()
        try:
            with self._autocast():
                states = module(**inputs, use_cache=False, fused_sd=request).result
        finally:
            module.train(was_training)
        return placed.gather(states[0])[rows] if sharded else states

    def _place(self, batch: TensorDict, output_args: dict, rows: Tensor) -> PlacedRows:
        """Find packed rows of a batch in what the forward on this rank returns."""
        offsets = batch["input_ids"].offsets()
        num_rows = len(batch["input_ids"].values())
        if not tu.get_non_tensor_data(data=batch, key="use_remove_padding", default=True):
            width = int(offsets.diff().max())
            return PlacedRows(Shard(offsets, 0, num_rows, width), rows, lambda values: values)
        # verl pads the packed batch at its end, then gives each Ulysses rank an equal slice
        pad_size = output_args["pad_size"]
        num_rows = (num_rows + pad_size) // self.ulysses_sequence_parallel_size
        rank = 0
        if self.ulysses_device_mesh is not None:
            rank = self.ulysses_device_mesh["sp"].get_local_rank()
        shard = Shard(offsets, rank * num_rows, num_rows)
        return PlacedRows(
            shard, shard.owned(rows), lambda values: self._gather_and_unpad_packed(values, pad_size)
        )

    def _autocast(self) -> AbstractContextManager[Any]:
        """Return the context in which verl's ``forward_step`` runs the model.

        A teacher that ran in another precision would differ from an equal student.
        """
        if self._autocast_dtype == torch.float32:
            return nullcontext()
        return torch.autocast(device_type=get_device_name(), dtype=self._autocast_dtype)


def _drop_fused_arguments(inputs: dict[str, Any]) -> None:
    """Remove the keywords that verl passes to its own fused forwards; the model's has none."""
    for name in ("temperature", "shift_labels", "return_dict"):
        inputs.pop(name, None)
