"""Tiny models with LoRA adapters whose update is not 0."""

import peft
import torch
from tiny_models import tiny_model


def adapted(family="Llama", **settings):
    """A model with LoRA whose update is not 0."""
    config = peft.LoraConfig(**{"r": 4, "target_modules": ["q_proj"], **settings})
    model = peft.get_peft_model(tiny_model(family), config).double()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


ADAPTERS = {
    "layers": {},
    "head": {"target_modules": ["q_proj", "lm_head"]},
    "head with bias": {"family": "Phi", "target_modules": ["lm_head"]},
    "scaled head": {"family": "Cohere", "target_modules": ["lm_head"], "lora_alpha": 32},
    "saved head": {"modules_to_save": ["lm_head"]},
}
