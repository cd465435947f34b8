"""TRL's ``loss_type`` expressed as token weights.

Dimension key:  B sequences, T completion tokens
"""

import torch
from torch import Tensor

from fused_sd import aggregation_weights


def loss_type_weights(
    mask: Tensor,  # (B, T)
    loss_type: str,
    *,
    step_tokens: Tensor,  # ()
    max_length: int,
    dtype: torch.dtype,
) -> Tensor:
    """Return weights (B, T) whose weighted sum is the average that ``loss_type`` names.

    Args:
        mask: 1 where a token counts.
        loss_type: TRL's name of the average.
        step_tokens: the divisor of "dapo": the average number of tokens that a micro-batch of one
            process has.  Gradient accumulation and data parallelism then average the micro-batches'
            losses, which makes the whole a mean over all tokens of the step.
        max_length: what "dr_grpo" takes for the length of each sequence.
        dtype: of the weights.
    """
    if loss_type == "dapo":
        num_tokens = step_tokens.clamp(min=1)
        return aggregation_weights(mask, "token_mean", num_tokens=num_tokens, dtype=dtype)
    if loss_type == "dr_grpo":
        return aggregation_weights(mask, "constant_length", length=max_length, dtype=dtype)
    mode = {"bnpo": "token_mean", "grpo": "all_sequences_mean_token_mean"}[loss_type]
    return aggregation_weights(mask, mode, dtype=dtype)  # type: ignore[arg-type]


def sequence_means(values: Tensor, mask: Tensor) -> Tensor:
    """Return the mean (B, 1) of each sequence's values over the tokens of the mask; 0 for none.

    Args:
        values: (B, T), or (B, 1) for all tokens of a sequence.
        mask: (B, T).
    """
    counts = mask.sum(-1, keepdim=True).clamp(min=1)
    return (values * mask).sum(-1, keepdim=True) / counts
