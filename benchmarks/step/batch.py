"""The batch that every trainer gets, with the keys of TRL's rollouts.

Dimension key:  B sequences, T response tokens of each
"""

import math
from typing import Any

import torch
from torch import Tensor

PROMPT_TOKENS = 256
FEEDBACK_TOKENS = 512  # the teacher reads them before the prompt
FIRST_WORD = 2  # the ids 0 and 1 are padding and end


def shape(num_tokens: int, row_tokens: int) -> tuple[int, int]:
    """Return the number of rows and their length; tokens are rounded up to fill equal rows."""
    rows = max(1, math.ceil(num_tokens / row_tokens))
    return rows, math.ceil(num_tokens / rows)


def make_batch(
    num_tokens: int, row_tokens: int, vocab: int, device: str, seed: int = 0
) -> dict[str, Any]:
    """Return prompts, the same prompts after feedback, and responses of one length without padding.

    Args:
        num_tokens: Tokens of all responses together.
        row_tokens: Tokens of the longest response that a row may hold.
        vocab: Size of the vocabulary.
        device: Device of all tensors.
        seed: Seed of the token ids.
    """
    rows, length = shape(num_tokens, row_tokens)
    generator = torch.Generator().manual_seed(seed)

    def ids(width: int) -> Tensor:
        # frequent tokens have small ids, roughly as byte-pair vocabularies order them
        drawn = torch.rand(rows, width, generator=generator) ** 3
        return (FIRST_WORD + drawn * (vocab - FIRST_WORD)).long().clamp_(max=vocab - 1).to(device)

    prompt, feedback, completion = ids(PROMPT_TOKENS), ids(FEEDBACK_TOKENS), ids(length)
    teacher = torch.cat([feedback, prompt, completion], 1)
    return {
        "prompt_ids": prompt,
        "prompt_mask": torch.ones_like(prompt),
        "completion_ids": completion,
        "completion_mask": torch.ones_like(completion),
        "teacher_input_ids": teacher,
        "teacher_attention_mask": torch.ones_like(teacher),
        "self_distillation_mask": torch.ones(rows, device=device),
    }
