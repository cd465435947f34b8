"""How a measurement fails."""

import torch


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error means out of memory, by its type or, for other allocators, its message."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    said = str(error).lower()
    return isinstance(error, RuntimeError) and ("out of memory" in said or "not enough mem" in said)
