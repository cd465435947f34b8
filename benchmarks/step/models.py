"""Qwen3 models with random weights, in the sizes of their public configurations."""

from typing import Any

import torch
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from benchmarks.step.sizes import Size

# Standard deviation of the logits.  The largest ones are then 20 to 30, as in a trained model.
LOGIT_SPREAD = 5.0
# Scale of what all attention layers together add to the states.  The feedback then moves the
# teacher from the student by a KL of about 0.01 to 0.1 nat, as in self-distillation.
CONTEXT_SHARE = 0.1


def configuration(size: Size) -> Qwen3Config:
    """Return the public configuration; all three public sizes tie their embeddings."""
    config = Qwen3Config(
        vocab_size=size.vocab,
        hidden_size=size.hidden,
        intermediate_size=size.intermediate,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.key_value_heads,
        head_dim=size.head_dim,
        max_position_embeddings=40960,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        tie_word_embeddings=True,
        # every GEMM keeps the scale of its input at any width; the usual 0.02 does so at 2500
        initializer_range=size.hidden**-0.5,
    )
    config._attn_implementation = "sdpa"
    return config


def random_model(size: Size, device: str, dtype: torch.dtype, seed: int = 0) -> Any:
    """Return a model whose weights are the same in every process on one kind of machine."""
    torch.manual_seed(seed)
    config = configuration(size)
    previous = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            model = Qwen3ForCausalLM(config)
    finally:
        torch.set_default_dtype(previous)
    with torch.no_grad():
        model.model.norm.weight.fill_(LOGIT_SPREAD)
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.mul_(CONTEXT_SHARE / size.layers)
    return model


def tokenizer() -> Any:
    """Return a tokenizer with the padding and end tokens that the trainers need, and no others."""
    from tokenizers import Tokenizer, models

    words = models.WordLevel({"<pad>": 0, "<eos>": 1}, unk_token="<pad>")
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(words),
        pad_token="<pad>",
        eos_token="<eos>",
        padding_side="left",
    )
