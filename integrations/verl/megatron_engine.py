"""verl's Megatron engine with this library's losses in place of the output layer.

The engine, its packing and its schedule stay verl's.  verl's fused forward hands Megatron-Core
(0.18 and later) an ``output_processor`` that knows no teacher; while a micro-batch's forward runs,
that function's name in verl's module stands for ours, and afterwards for verl's again.

What was run, against verl's own path with logits, in two processes on CPUs (gloo, float64, one
layer with stand-ins for fused attention and norm), losses and the gradient of every parameter:
tensor parallelism, with and without sequence parallelism, tied and untied; context parallelism
(zig-zag); pipeline parallelism; Megatron-Core 0.18.2.  What was not: GPUs, NCCL, Transformer
Engine, Apex's norms, the distributed optimizer, FP8, dynamic context parallelism, mixtures of
experts and vision models; there all but the step from hidden states to losses is verl's and
Megatron's own code.
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
from fused_sd.integrations.verl.forward import flag, has_local_teacher, loss_config_of
from fused_sd.integrations.verl.megatron_output import OutputProcessor
from fused_sd.integrations.verl.rows import predicting_rows, response_values


def why_not() -> str | None:
    """What the installed Megatron-Core lacks for the fused forward, or None."""
    if model_forward_fused._supports_output_processor_hook(model_forward_fused.GPTModel):
        return None
    return (
        "megatron-core must be >=0.18, whose GPTModel takes an output_processor, got "
        f"{model_forward_fused.mcore.__version__}; install that (Python 3.12)"
    )


class FusedSDMegatronEngine(MegatronEngineWithLMHead):
    """verl's engine, and with ``use_fused_kernels=True`` and ``impl_backend=fused_sd`` fused.

    Distils from a teacher server's entries; log-probs and entropy are for verl's other losses.

    Raises:
        ValueError: the fused forward was asked for and cannot run with this model or Megatron-Core.
    """

    @property
    def _asked_for(self) -> bool:
        options = self.model_config.fused_kernel_options or {}
        return options.get("impl_backend") == VENDOR

    def _maybe_enable_fused_kernels(self) -> None:
        asked_for = self._asked_for and self.engine_config.use_fused_kernels
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
                    why_not() or "pass use_fused_kernels=False",
                )

    def forward_step(
        self,
        batch_iter: Iterator[TensorDict],
        model: nn.Module,
        logits_processor_func: Callable[..., Any] | None,
        postprocess_micro_batch_func: Callable[..., Any],
    ) -> tuple[Any, Callable[..., Any]]:
        """verl's step; the output has what a distillation loss reads."""
        if not (self._asked_for and self.engine_config.use_fused_kernels):
            return super().forward_step(
                batch_iter, model, logits_processor_func, postprocess_micro_batch_func
            )
        batch = next(batch_iter).to(get_device_id())
        processor = self._output_processor(batch, unwrap_model(model), logits_processor_func)
        with standing_in(processor):
            output, postprocess = super().forward_step(
                iter([batch]), model, logits_processor_func, postprocess_micro_batch_func
            )
        if isinstance(output, dict):  # the last pipeline stage
            output.update(split_columns(output.pop("log_probs"), processor.columns))
        return output, postprocess

    def _output_processor(
        self, batch: TensorDict, model: Any, loss_function: Callable[..., Any] | None
    ) -> OutputProcessor:
        """What this micro-batch asks for."""
        rows, loss_config = predicting_rows(batch), loss_config_of(loss_function)
        if has_local_teacher(loss_config):
            fail(
                "distillation_loss.teacher",
                'be "server" with Megatron, whose engine runs no second forward',
                "a teacher in the training process",
                'pass teacher="server" with a teacher model, or train with FSDP2',
            )
        teacher = {}
        is_taught = flag(batch, "distillation_use_topk")
        if is_taught:
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
            loss_config=loss_config if is_taught else None,
            teacher=teacher,
        )

    def _packing(self, batch: TensorDict, model: Any) -> Callable[[Tensor], Tensor]:
        """How verl packs the labels, without the roll by which they are the next tokens."""
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
def standing_in(processor: OutputProcessor) -> Iterator[None]:
    """verl's fused forward hands Megatron this processor instead of its own."""
    own = model_forward_fused.fused_output_processor
    model_forward_fused.fused_output_processor = processor
    try:
        yield
    finally:
        model_forward_fused.fused_output_processor = own


def split_columns(jagged: Tensor, names: tuple[str, ...]) -> dict[str, Tensor]:
    """A jagged (sequences, length, columns) as one jagged (sequences, length) for each name."""
    offsets = jagged.offsets()  # type: ignore[attr-defined]
    return {
        name: torch.nested.nested_tensor_from_jagged(column, offsets)
        for name, column in zip(names, jagged.values().unbind(-1), strict=True)
    }


def _at_rows(batch: TensorDict, rows: Tensor, values: Tensor) -> Tensor:
    """Values of packed rows, jagged like ``input_ids`` and 0 elsewhere."""
    ids = batch["input_ids"]
    spread = values.new_zeros(ids.values().shape[0]).index_copy(0, rows, values)
    return torch.nested.nested_tensor_from_jagged(spread, ids.offsets())
