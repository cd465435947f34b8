"""What the checks of a model share: evaluation mode, ids to try, and a product's precision."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from fused_sd import LMHead


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model in evaluation mode, and give every submodule its own mode back afterwards.

    ``model.train()`` would not do: it also switches on submodules that the user keeps in evaluation
    mode.
    """
    training = [part for part in model.modules() if part.training]
    model.eval()
    try:
        yield
    finally:
        for part in training:
            part.training = True


def probe_ids(model: PreTrainedModel, num_sequences: int, length: int) -> Tensor:
    """Return token ids (num_sequences, length) that are spread over the vocabulary."""
    embeddings: Any = model.get_input_embeddings()
    device = embeddings.weight.device
    if device.type == "meta":  # offloaded: accelerate's hook moves weight and ids where it says
        device = getattr(embeddings._hf_hook, "execution_device", None) or torch.device("cpu")
    count = torch.arange(1, num_sequences * length + 1, device=device)
    # multiples of a prime lie far apart and do not repeat early
    return (7919 * count).view(num_sequences, length) % model.config.get_text_config().vocab_size


def product_precision(hidden: Tensor, head: LMHead) -> float:
    """Return the machine epsilon of the head's product, whose dtype autocast may have chosen."""
    return torch.finfo(nn.functional.linear(hidden[:, :1], head.weight[:1]).dtype).eps
