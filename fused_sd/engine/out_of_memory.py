"""What is said where a run does not fit into memory: what it holds, and a chunk that holds less.

Nothing is tried again.  A run cannot know whether the memory will be enough the next time, and an
error that names the number costs one run, where a second try in each step would cost time in all.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from fused_sd.engine.layout import Layout, RunSize, workspace_bytes

# of other allocators, PyTorch's for CPUs among them, on Linux and on Windows
WORDS = ("out of memory", "can't allocate memory", "not enough memory")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error means out of memory, by its type or, for other allocators, its message."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    said = str(error).lower()
    return isinstance(error, RuntimeError) and any(words in said for words in WORDS)


@contextmanager
def explained(size: RunSize, layout: Layout) -> Iterator[None]:
    """Add to an allocator's error what a run holds, and the chunk size that halves it.

    The error keeps its class and its own words, by which others recognise it: accelerate's
    ``find_executable_batch_size``, for one.
    """
    try:
        yield
    except RuntimeError as error:  # torch.OutOfMemoryError is one, too
        if not is_out_of_memory(error):
            raise
        is_device = isinstance(error, torch.OutOfMemoryError)
        kind = torch.OutOfMemoryError if is_device else RuntimeError
        raise kind(f"{error}\n{_advice(size, layout)}") from error


def _advice(size: RunSize, layout: Layout) -> str:
    """Say what is held, and what would hold less."""
    held = workspace_bytes(size, layout)
    said = (
        f"fused_sd: logits and their gradients take {_mib(held)}, in chunks of {layout.chunk} "
        f"tokens, and the head's gradient {_mib(size.dweight_bytes)}."
    )
    chunk, smaller = layout.chunk, held
    while chunk > 1 and 2 * smaller > held:
        chunk //= 2
        smaller = workspace_bytes(size, Layout(chunk, size.chunks_in_group * chunk))
    if smaller < held:
        said += f"  chunk_size={chunk} takes {_mib(smaller)} instead of the first."
    if size.dweight_bytes:
        said += "  A frozen head, LoRA or gradient='sparse' takes less than the second."
    return said


def _mib(num_bytes: int) -> str:
    return f"{num_bytes / 2**20:,.0f} MiB"
