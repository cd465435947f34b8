"""The batch that every provider gets, in the keys of TRL's rollouts.

Dimension key:  B sequences, T response tokens of each
"""

import math
from typing import Any

import torch
from torch import Tensor

PROMPT_TOKENS = 256
FEEDBACK_TOKENS = 512  # what the teacher reads besides
FIRST_WORD = 2  # after padding and end


def shape(num_tokens: int, row_tokens: int) -> tuple[int, int]:
    """Rows and their length for a number of response tokens; rounded up to equal rows."""
    rows = max(1, math.ceil(num_tokens / row_tokens))
    return rows, math.ceil(num_tokens / rows)


def make_batch(
    num_tokens: int, row_tokens: int, vocab: int, device: str, seed: int = 0
) -> dict[str, Any]:
    """A prompt, the same behind feedback, and responses of equal length: no padding, all count.

    Args:
        num_tokens: of all responses.
        row_tokens: the longest response.
    """
    rows, length = shape(num_tokens, row_tokens)
    generator = torch.Generator().manual_seed(seed)

    def ids(width: int) -> Tensor:
        # frequent tokens have small ids, roughly as byte-pair vocabularies order them
        drawn = torch.rand(rows, width, generator=generator) ** 3
        return (FIRST_WORD + drawn * (vocab - FIRST_WORD)).long().clamp_(max=vocab - 1).to(device)

    prompt, feedback, completion = ids(PROMPT_TOKENS), ids(FEEDBACK_TOKENS), ids(length)
    teacher = torch.cat([feedback, prompt, completion], 1)
    counted = torch.ones(rows, length, device=device)
    count = torch.tensor(float(rows * length), device=device)
    return {
        "prompt_ids": prompt,
        "prompt_mask": torch.ones_like(prompt),
        "completion_ids": completion,
        "completion_mask": torch.ones_like(completion),
        "teacher_input_ids": teacher,
        "teacher_attention_mask": torch.ones_like(teacher),
        "self_distillation_mask": torch.ones(rows, device=device),
        # RLSD's policy loss reads these besides
        "loss_mask": counted,
        "num_loss_tokens": count,
        "num_tokens": count,
        "advantages": torch.randn(rows, generator=generator).to(device),
        "rewards": torch.zeros(rows, device=device),
    }
