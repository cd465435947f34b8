"""How many tokens are walked at a time.

Dimension key:  C tokens in a chunk, V vocabulary
"""

from collections.abc import Iterator

import torch
from torch import Tensor

# bytes of logits in flight: on a GPU large enough that the GEMMs run at full rate and the head's
# gradient is accumulated rarely, on a CPU small enough to stay near the caches
GPU_BUDGET = 5 * 2**28
CPU_BUDGET = 2**26
MAX_CHUNK = 4096
ALIGNMENT = 16  # columns, so that every row of logits starts at an aligned address


def workspace_width(vocab: int) -> int:
    """Columns of a chunk's logits: room for the vocabulary and at least one column of padding."""
    return (vocab // ALIGNMENT + 1) * ALIGNMENT


def chunk_size_for(width: int, device: torch.device, sides: int) -> int:
    """Tokens in a chunk whose fp32 logits, on all sides together, fit the budget."""
    budget = CPU_BUDGET if device.type == "cpu" else GPU_BUDGET
    size = budget // (4 * width * sides)
    step = 1 if size < 128 else 128
    return min(MAX_CHUNK, max(1, size // step * step))


def chunk_rows(num_tokens: int, size: int) -> Iterator[slice]:
    """Slices of at most ``size`` tokens that cover them all."""
    for start in range(0, num_tokens, size):
        yield slice(start, min(start + size, num_tokens))


def gradient_view(logits: Tensor, dtype: torch.dtype) -> Tensor:
    """The memory of a chunk's logits (C, W) as a matrix (C, W) of a dtype no wider than theirs.

    Row by row: a narrower row lies in the first bytes of the logits' own row.
    """
    return logits.view(dtype)[:, : logits.shape[1]]
