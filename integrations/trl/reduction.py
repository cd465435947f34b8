"""TRL's ``loss_type`` as weights of tokens.

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
    """Weights (B, T) whose weighted sum is the average that ``loss_type`` names.

    Args:
        step_tokens: tokens that a micro-batch of one process has on average over the batch, whose
            multiple "dapo" divides by: gradient accumulation and data parallelism average, so that
            the whole is a mean over all tokens.
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
