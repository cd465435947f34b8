"""Tiny models of classes that do more around their head than ``tiny_models``' families."""

import torch
import transformers
from tiny_models import SIZES
from transformers import PreTrainedModel

VISION = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 4,
}
TEXT = {**SIZES, "head_dim": 8}
MOE = {"num_local_experts": 2, "num_experts_per_tok": 1, "intermediate_size_mlp": 48}
LLAMA4_VISION = {**VISION, "vision_output_dim": 32, "projector_input_dim": 32}
LLAMA4_VISION |= {"projector_output_dim": 32, "pixel_shuffle_ratio": 0.5}
COHERE2 = {**TEXT, "model_type": "cohere2", "logit_scale": 0.25}
SIGLIP = {**VISION, "model_type": "siglip_vision_model"}
MPT = {"d_model": 32, "n_heads": 4, "n_layers": 2, "vocab_size": 97, "max_seq_len": 64}
INKLING = {
    **TEXT,
    "logits_mup_width_multiplier": 3.0,
    "unpadded_vocab_size": 90,
    "swa_num_attention_heads": 4,
    "swa_num_key_value_heads": 2,
    "swa_head_dim": 8,
    "moe_intermediate_size": 16,
    "n_routed_experts": 2,
    "n_shared_experts": 1,
    "num_experts_per_tok": 1,
}

MLA = {
    **SIZES,
    "num_key_value_heads": 4,
    "kv_lora_rank": 8,
    "q_lora_rank": 8,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
}
GEMMA3N = {
    **TEXT,
    "num_hidden_layers": 3,
    "num_kv_shared_layers": 1,
    "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": 97,
    "laurel_rank": 4,
    "layer_types": ["full_attention", "sliding_attention", "full_attention"],
    "activation_sparsity_pattern": [0.0] * 3,
    "final_logit_softcapping": 3.0,
}

# what each does that a head and its config do not say
CLASSES = {
    # layers between the backbone and the head
    "BertLMHeadModel": {"is_decoder": True},
    "RemBertForCausalLM": {
        "is_decoder": True,
        "input_embedding_size": 16,
        "output_embedding_size": 24,
    },
    # a base_model_prefix that names no backbone
    "Llama4ForCausalLM": {**TEXT, **MOE},
    "MllamaForCausalLM": {**TEXT, "cross_attention_layers": [1], "bos_token_id": 1},
    # the head of a model inside the model
    "Llama4ForConditionalGeneration": {
        "text_config": {**TEXT, **MOE},
        "vision_config": LLAMA4_VISION,
    },
    # a setting of the text model that the class leaves out
    "AyaVisionForConditionalGeneration": {"text_config": COHERE2, "vision_config": SIGLIP},
    "Cohere2VisionForConditionalGeneration": {"text_config": COHERE2, "vision_config": SIGLIP},
    "MptForCausalLM": {**MPT, "logit_scale": 0.5},
    # the logits times logits_scaling, by which Granite divides
    "HyperCLOVAXForCausalLM": {**TEXT, "logits_scaling": 0.25},
    # a factor before the head
    "MiniCPM3ForCausalLM": {**MLA, "dim_model_base": 8},
    # a soft-cap behind layers of another kind
    "Gemma3nForCausalLM": GEMMA3N,
    # a bias, and a backbone of another name
    "GPTJForCausalLM": {"rotary_dim": 4},
    # a factor before the head, and fewer logits than the head has rows
    "InklingForCausalLM": INKLING,
}


def tiny_class(name: str) -> PreTrainedModel:
    """A float64 model in evaluation mode, all of whose parameters are random."""
    made = getattr(transformers, name)
    settings = CLASSES[name]
    if "text_config" not in settings:
        settings = {**({} if name.startswith("Mpt") else SIZES), **settings}
    torch.manual_seed(0)
    config = made.config_class(**settings)
    config._experts_implementation = "eager"  # the others have no float64
    model = made(config).eval().double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model
