"""Tiny Megatron models on CPUs, verl's engines around them, and batches.

Megatron runs on a CPU if every weight is made there.  Its fused attention and norms do not, so
stand-ins replace them.
"""

import contextlib
import itertools
import warnings
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # Transformer Engine and Apex are not installed
    from megatron.core import parallel_state
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.models.gpt.gpt_model import GPTModel
    from megatron.core.tensor_parallel import ColumnParallelLinear  # noqa: F401, for tests
    from megatron.core.tensor_parallel import random as megatron_random
    from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
    from megatron.core.transformer.transformer_config import TransformerConfig
    from verl.models.mcore.model_forward_fused import (
        _supports_output_processor_hook,
    )
    from verl.utils import tensordict_utils
    from verl.workers.engine.megatron.transformer_impl import (
        MegatronEngineWithLMHead,  # noqa: F401, for tests
    )

VOCAB, HIDDEN, TOPK = 64, 16, 6
LENGTHS = ((3, 4), (5, 2), (2, 6), (4, 4))  # prompts and responses
DTYPE = torch.float64


def stand_in_for_cuda() -> None:
    """Let Megatron put its buffers on the CPU, and switch off its CUDA generators.

    Dropout is off in these tests, so no generator is needed.
    """
    torch.cuda.current_device, torch.cuda.synchronize = lambda: "cpu", lambda: None
    tracker = megatron_random.CudaRNGStatesTracker
    tracker.fork = lambda *_args, **_kwargs: contextlib.nullcontext()
    zeros = torch.zeros
    torch.zeros = lambda *args, **kwargs: zeros(*args, **{**kwargs, "device": "cpu"})


class Norm(nn.Module):
    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size, dtype=DTYPE))

    def forward(self, hidden: Tensor) -> Tensor:
        return nn.functional.rms_norm(hidden, hidden.shape[-1:], self.weight)


class Attention(nn.Module):
    """Causal attention within each packed sequence."""

    def __init__(self, *_args: Any, **_kwargs: Any) -> None:
        super().__init__()

    def forward(
        self, *query_key_value_mask: Tensor, packed_seq_params: Any, **_kwargs: Any
    ) -> Tensor:
        sides, bounds = query_key_value_mask[:3], packed_seq_params.cu_seqlens_q.tolist()
        attended = [
            nn.functional.scaled_dot_product_attention(
                *(side[start:stop].transpose(0, 1) for side in sides), is_causal=True
            ).transpose(0, 1)
            for start, stop in itertools.pairwise(bounds)
        ]
        return torch.cat(attended).flatten(1)


class OwnToken(Attention):
    """Attention of each token to itself alone, for sequences split over ranks."""

    def forward(self, *query_key_value_mask: Tensor, **_kwargs: Any) -> Tensor:
        return query_key_value_mask[2].flatten(1)


class HookedGPT(GPTModel):
    """A model with Megatron-Core 0.18's ``output_processor`` for older versions."""

    def forward(
        self,
        *args: Any,
        output_processor: Any = None,
        output_processor_context: Any = None,
        **kwargs: Any,
    ) -> Any:
        self._hook = output_processor, output_processor_context
        return super().forward(*args, **kwargs)

    def _postprocess(self, hidden_states: Tensor, **kwargs: Any) -> Any:
        processor, context = self._hook
        if processor is None or not self.post_process:
            return super()._postprocess(hidden_states=hidden_states, **kwargs)
        tied = self.share_embeddings_and_output_weights
        return processor(
            hidden_states=hidden_states,
            output_layer=self.output_layer,
            output_weight=self.shared_embedding_or_output_weight() if tied else None,
            labels=kwargs["labels"],
            packed_seq_params=kwargs["packed_seq_params"],
            context=context,
            config=self.config,
        )


def gpt(
    *,
    tensor_parallel: int = 1,
    context_parallel: int = 1,
    pipeline_parallel: int = 1,
    sequence_parallel: bool = False,
    tied: bool = False,
    vocab: int = VOCAB,
) -> GPTModel:
    """A float64 model with one layer on each stage, and the weights that one process would have."""
    config = TransformerConfig(
        num_layers=pipeline_parallel,
        hidden_size=HIDDEN,
        num_attention_heads=2,
        ffn_hidden_size=32,
        tensor_model_parallel_size=tensor_parallel,
        context_parallel_size=context_parallel,
        pipeline_model_parallel_size=pipeline_parallel,
        variable_seq_lengths=True,
        moe_token_dispatcher_type="alltoall",  # the default refuses variable lengths
        batch_p2p_comm=False,
        sequence_parallel=sequence_parallel,
        use_cpu_initialization=True,
        params_dtype=DTYPE,
        pipeline_dtype=DTYPE,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        add_bias_linear=False,
        gradient_accumulation_fusion=False,
        init_method_std=0.5,
    )
    layer = get_gpt_layer_local_spec(normalization="RMSNorm")
    layer.submodules.input_layernorm = layer.submodules.pre_mlp_layernorm = Norm
    attention = Attention if context_parallel == 1 else OwnToken
    layer.submodules.self_attention.submodules.core_attention = attention
    hooked = _supports_output_processor_hook(GPTModel)  # reads the forward's parameters
    torch.manual_seed(1)
    return (GPTModel if hooked else HookedGPT)(
        config,
        TransformerBlockSubmodules(layer_specs=[layer], layer_norm=Norm),
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
        vocab_size=vocab,
        max_sequence_length=64,
        position_embedding_type="none",
        share_embeddings_and_output_weights=tied,
    )


def engine(
    kind: type, model: Any, *, fused: bool, backend: str = "fused_sd", mtp: bool = False
) -> Any:
    """verl's engine around a model that does not come from Hugging Face."""
    made = object.__new__(kind)
    made.engine_config = SimpleNamespace(
        use_fused_kernels=fused,
        use_remove_padding=True,
        pad_to_length=False,
        pad_to_length_bucket=None,
        pad_bshd_to_minibatch_max=False,
        dynamic_context_parallel=False,
        context_parallel_size=model.config.context_parallel_size,
        entropy_from_logits_with_chunking=False,
        router_replay=SimpleNamespace(mode="disabled"),
    )
    text = SimpleNamespace(vocab_size=VOCAB)
    made.model_config = SimpleNamespace(
        fused_kernel_options={"impl_backend": backend},
        hf_config=SimpleNamespace(
            architectures=["LlamaForCausalLM"], vocab_size=VOCAB, get_text_config=lambda: text
        ),
        tokenizer=SimpleNamespace(pad_token_id=0),
        mtp=SimpleNamespace(enable=mtp, enable_train=False),
        model_type="language_model",
    )
    made.enable_routing_replay, made.is_value_model = False, False
    made.tf_config, made.module = model.config, [model]
    made._maybe_enable_fused_kernels()
    return made


def batch(*, fused: bool, policy: bool, temperature: float = 0.8, distil: bool = True) -> Any:
    """Four samples as verl's trainer gives them to an actor, two in each micro-batch."""
    samples = list(_samples())
    tensors = {
        name: torch.nested.as_nested_tensor([one[name] for one in samples], layout=torch.jagged)
        for name in samples[0]
    }
    made = tensordict_utils.get_tensordict(tensors)
    tensordict_utils.assign_non_tensor(
        made,
        use_fused_kernels=fused,
        calculate_entropy=policy,
        distillation_use_topk=distil,
        distillation_only=distil and not policy,
        temperature=temperature,
        global_batch_size=len(samples),
        use_dynamic_bsz=False,
        micro_batch_size_per_gpu=2,
    )
    return made


def _samples() -> Iterator[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(7)
    for prompt, response in LENGTHS:
        ids = torch.randint(2, VOCAB, (prompt + response,), generator=generator)
        logits = 3 * torch.randn(len(ids), VOCAB, generator=generator, dtype=DTYPE)
        top = logits.log_softmax(-1).topk(TOPK)
        mask = torch.ones(response, dtype=torch.int64)
        mask[1] = 0  # a tool's answer
        yield {
            "input_ids": ids,
            "prompts": ids[:prompt],
            "responses": ids[prompt:],
            "response_mask": mask,
            "loss_mask": mask,
            "teacher_ids": top.indices.int(),
            "teacher_logprobs": top.values,
            "old_log_probs": -4 + torch.rand(response, generator=generator),
            "advantages": torch.randn(response, generator=generator),
        }
