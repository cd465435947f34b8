"""verl's Megatron engine with the losses in place of the output layer.

The engine, its packing and its schedule stay verl's.  verl's fused forward passes Megatron-Core
(0.18 and later) an ``output_processor`` that knows no teacher, and offers no way to choose another.
It looks that function up in its module whenever it runs, so while a micro-batch's forward runs, the
name ``fused_output_processor`` in ``verl.models.mcore.model_forward_fused`` stands for ours.

Tested against verl's own path with logits, in two processes on CPUs (gloo, float64, one layer with
stand-ins for fused attention and norm), by the losses and the gradient of every parameter: tensor
parallelism with and without sequence parallelism, tied and untied; context parallelism (zig-zag);
pipeline parallelism; Megatron-Core 0.18.2.  Not run: GPUs, NCCL, Transformer Engine, Apex's norms,
the distributed optimizer, FP8, dynamic context parallelism, mixtures of experts and vision models.
There, everything but the step from hidden states to losses is verl's and Megatron's own code.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor, nn
from verl.models.mcore import model_forward_fused
from verl.models.mcore.util import preprocess_thd_engine
from verl.utils import tensordict_utils
from verl.utils.device import get_device_id
from verl.utils.megatron_utils import unwrap_model
from verl.workers.engine.megatron.transformer_impl import MegatronEngineWithLMHead

from fused_sd.checks import fail
from fused_sd.integrations.verl import VENDOR
from fused_sd.integrations.verl.head_request import flag, has_local_teacher, loss_config_of
from fused_sd.integrations.verl.megatron_output import OutputProcessor
from fused_sd.integrations.verl.packed_rows import predicting_rows, response_values


def missing_feature() -> str | None:
    """Say what the installed Megatron-Core lacks for the fused forward; None: nothing."""
    if model_forward_fused._supports_output_processor_hook(model_forward_fused.GPTModel):
        return None
    return (
        "megatron-core must be >=0.18, whose GPTModel takes an output_processor, got "
        f"{model_forward_fused.mcore.__version__}; install that (Python 3.12)"
    )


class FusedSDMegatronEngine(MegatronEngineWithLMHead):
    """verl's engine; with ``use_fused_kernels=True`` and ``impl_backend=fused_sd`` it is fused.

    It distils from a teacher server's entries, and computes log-probabilities and entropy for
    verl's other losses.

    Raises:
        ValueError: the fused forward was asked for and cannot run with this model or Megatron-Core.
    """

    @property
    def _chooses_fused_sd(self) -> bool:
        options = self.model_config.fused_kernel_options or {}
        return options.get("impl_backend") == VENDOR

    def _maybe_enable_fused_kernels(self) -> None:
        # verl switches use_fused_kernels off, with a warning, for settings that its fused forward
        # cannot run, and falls back to a forward patch for models without the hook.  Then our
        # processor would never be called, so both are errors here.
        asked_for = self._chooses_fused_sd and self.engine_config.use_fused_kernels
        super()._maybe_enable_fused_kernels()
        if not asked_for:
            return
        if not self.engine_config.use_fused_kernels:
            fail(
                f"impl_backend={VENDOR}",
                "come with use_remove_padding=True and without multi-token prediction",
                f"use_remove_padding={self.engine_config.use_remove_padding}, "
                f"mtp.enable={self.model_config.mtp.enable}",
                "change them, or pass use_fused_kernels=False",
            )
        for model in self.module:
            if not model_forward_fused._use_output_processor_hook(model):
                fail(
                    "the model's forward",
                    "take Megatron-Core's output_processor",
                    type(unwrap_model(model)).__qualname__,
                    missing_feature() or "pass use_fused_kernels=False",
                )

    def forward_step(
        self,
        batch_iter: Iterator[TensorDict],
        model: nn.Module,
        logits_processor_func: Callable[..., Any] | None,
        postprocess_micro_batch_func: Callable[..., Any],
    ) -> tuple[Any, Callable[..., Any]]:
        """Run verl's step; its output then also has what a distillation loss reads."""
        if not (self._chooses_fused_sd and self.engine_config.use_fused_kernels):
            return super().forward_step(
                batch_iter, model, logits_processor_func, postprocess_micro_batch_func
            )
        # verl's step takes its micro-batch from the iterator: take it first, and hand it on
        batch = next(batch_iter).to(get_device_id())
        processor = self._output_processor(batch, unwrap_model(model), logits_processor_func)
        with replaced_output_processor(processor):
            output, postprocess = super().forward_step(
                iter([batch]), model, logits_processor_func, postprocess_micro_batch_func
            )
        if isinstance(output, dict):  # on the last pipeline stage; others return hidden states
            output.update(split_columns(output.pop("log_probs"), processor.columns))
        return output, postprocess

    def _output_processor(
        self, batch: TensorDict, model: Any, loss_function: Callable[..., Any] | None
    ) -> OutputProcessor:
        """Build the output processor of a micro-batch."""
        rows, loss_config = predicting_rows(batch), loss_config_of(loss_function)
        if has_local_teacher(loss_config):
            fail(
                "distillation_loss.teacher",
                'be "server" with Megatron, whose engine runs no second forward',
                "a teacher in the training process",
                'pass teacher="server" with a teacher model, or train with FSDP2',
            )
        teacher = {}
        has_server_teacher = flag(batch, "distillation_use_topk")
        if has_server_teacher:
            teacher["teacher_token_ids"] = batch["teacher_ids"]
            teacher["teacher_log_probs"] = batch["teacher_logprobs"]
            if "old_log_probs" in batch:
                teacher["old_log_probs"] = _at_rows(
                    batch, rows, response_values(batch, "old_log_probs", rows)
                )
        return OutputProcessor(
            self._packing(batch, model),
            _at_rows(batch, rows, torch.ones(rows.shape, device=rows.device)),
            self.model_config.hf_config.get_text_config().vocab_size,
            log_probs=not flag(batch, "distillation_only"),
            entropy=flag(batch, "calculate_entropy"),
            loss_config=loss_config if has_server_teacher else None,
            teacher=teacher,
        )

    def _packing(self, batch: TensorDict, model: Any) -> Callable[[Tensor], Tensor]:
        """Return a function that packs a jagged tensor as verl's fused forward packs the labels.

        The arguments are those of ``fused_forward_model_engine`` except ``need_roll``: labels are
        rolled to become the next tokens, and verl already keeps a teacher's values at the row that
        predicts their token.  Packing decides which context-parallel rank has which row.
        """
        bucket = (
            self.engine_config.pad_to_length_bucket if self.engine_config.pad_to_length else None
        )
        is_dsv4 = getattr(model.config, "experimental_attention_variant", None) == "dsv4_hybrid"
        pack = partial(
            preprocess_thd_engine,
            use_fp8_padding=model.config.fp8 in ("e4m3", "hybrid"),
            local_cp_size=tensordict_utils.get_non_tensor_data(batch, "local_cp_size", None),
            min_local_rows=model.config.csa_window_size if is_dsv4 else None,
            pad_to_length_bucket=bucket,
            cp_layout=self._get_context_parallel_layout(model),
        )
        return lambda jagged: pack(jagged)[0]


@contextmanager
def replaced_output_processor(processor: OutputProcessor) -> Iterator[None]:
    """Let verl's fused forward pass this processor to Megatron instead of its own."""
    own = model_forward_fused.fused_output_processor
    model_forward_fused.fused_output_processor = processor
    try:
        yield
    finally:
        model_forward_fused.fused_output_processor = own


def split_columns(jagged: Tensor, names: tuple[str, ...]) -> dict[str, Tensor]:
    """Split a jagged (sequences, length, columns) into a jagged (sequences, length) per name."""
    offsets = jagged.offsets()  # type: ignore[attr-defined]
    return {
        name: torch.nested.nested_tensor_from_jagged(column, offsets)
        for name, column in zip(names, jagged.values().unbind(-1), strict=True)
    }


def _at_rows(batch: TensorDict, rows: Tensor, values: Tensor) -> Tensor:
    """Write values of packed rows into zeros that are jagged like ``input_ids``."""
    ids = batch["input_ids"]
    packed = values.new_zeros(ids.values().shape[0]).index_copy(0, rows, values)
    return torch.nested.nested_tensor_from_jagged(packed, ids.offsets())
