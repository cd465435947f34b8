"""Tiny causal language models with random weights, made from configurations in memory."""

import torch
import transformers
from transformers import PreTrainedModel

VOCAB = 97
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": 1,
}
# what each does to its logits that the others do not
FAMILIES = {
    "Qwen3": {"head_dim": 8, "tie_word_embeddings": True},
    "Llama": {},
    "Gemma2": {"head_dim": 8, "final_logit_softcapping": 30.0},
    "Gemma3": {"head_dim": 8, "final_logit_softcapping": 20.0},
    "Cohere": {"logit_scale": 0.0625},
    "Granite": {"logits_scaling": 8.0},
    "Phi": {},  # a bias
    "FalconH1": {
        "lm_head_multiplier": 0.3,
        "mamba_d_ssm": 32,
        "mamba_n_heads": 4,
        "mamba_d_head": 8,
        "mamba_d_state": 8,
    },
}


def tiny_model(
    family: str = "Qwen3", *, vocab: int = VOCAB, spread: float = 0.3, **changes: object
) -> PreTrainedModel:
    """A model in evaluation mode; ``spread`` is the standard deviation of its weights."""
    name = "Gemma3TextConfig" if family == "Gemma3" else f"{family}Config"
    settings = {**SIZES, **FAMILIES[family], "initializer_range": spread, **changes}
    settings["vocab_size"] = vocab
    config = getattr(transformers, name)(**settings)
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(0, spread)
    return model


def random_ids(*shape: int, vocab: int = VOCAB, seed: int = 0) -> torch.Tensor:
    """Token ids that are neither padding nor the end."""
    return torch.randint(2, vocab, shape, generator=torch.Generator().manual_seed(seed))


def ragged(
    prompt: int, completion: int, lengths: list[tuple[int, int]]
) -> tuple[torch.Tensor, ...]:
    """Left-padded prompts and right-padded completions: ids (B, L), mask (B, L)."""
    ids = random_ids(len(lengths), prompt + completion)
    mask = torch.zeros_like(ids)
    for row, (before, behind) in zip(mask, lengths, strict=True):
        row[prompt - before : prompt + behind] = 1
    return ids.masked_fill(mask == 0, 0), mask
