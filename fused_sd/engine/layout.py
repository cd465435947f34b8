"""How many tokens a chunk holds, and how much memory that takes.

A *chunk* is the tokens whose logits are held at a time.  A *group* is the chunks whose dlogits are
held until two GEMMs turn them into the gradients w.r.t. hidden states and head.  Groups are longer
than chunks because each adds its part to dweight by reading and writing all of it: on an H200 at
512 tokens that traffic takes about as long as the GEMM itself, at 2048 a quarter of it.  Where
dweight is larger than the usual workspaces, they may take as much as it does, for groups of two to
three times as many tokens.

Dimension key:  C tokens in a chunk, G tokens in a group, W columns of a chunk's logits
"""

from typing import NamedTuple

import torch

# bytes of logits and their gradients in flight: on a GPU large enough that the GEMMs run at full
# rate, on a CPU small beside the logits of any batch worth chunking
GPU_BUDGET = 5 * 2**28
CPU_BUDGET = 3 * 2**26
SHARE_OF_FREE = 0.8  # of a GPU's free memory, where that is less
MAX_CHUNK = 4096
ALIGNMENT = 16  # columns, so that every row of logits starts at an aligned address


class Room(NamedTuple):
    """Bytes that a run's workspaces may take."""

    workspaces: int  # what the chunk and the shortest group are chosen by
    all: int  # with longer groups, where dweight is as large


class RunSize(NamedTuple):
    """What decides the memory of a run's workspaces."""

    vocab: int  # the larger of the two sides'
    sides: int  # whose whole logits are made: 0 to 2
    logit_bytes: int  # of one logit: 4, or 8 for float64 operands
    operand_bytes: int  # of one element of the GEMMs' operands, and of one dlogit
    has_dlogits: bool  # whether gradients of whole rows of logits are held
    dweight_bytes: int  # of the gradient that every group adds to; 0: there is none

    @property
    def width(self) -> int:
        return workspace_width(self.vocab)

    @property
    def in_place(self) -> bool:
        """Whether dlogits overwrite the student's logits, which they do where they are as wide."""
        return self.has_dlogits and self.operand_bytes == self.logit_bytes

    @property
    def chunks_in_group(self) -> int:
        """How many chunks a group has at least: fewer where a dlogit is as wide as a logit."""
        return 2 if self.in_place else 4


class Layout(NamedTuple):
    """Tokens in a chunk and in a group."""

    chunk: int
    group: int


def workspace_width(vocab: int) -> int:
    """Columns of a chunk's logits: the vocabulary and at least one column of padding."""
    return (vocab // ALIGNMENT + 1) * ALIGNMENT


def workspace_bytes(size: RunSize, layout: Layout) -> int:
    """Bytes of logits and dlogits that a run holds."""
    if size.in_place:
        columns = size.logit_bytes * (layout.group + (size.sides - 1) * layout.chunk)
    else:
        gradients = size.operand_bytes * layout.group if size.has_dlogits else 0
        columns = size.logit_bytes * size.sides * layout.chunk + gradients
    return size.width * columns


def choose_layout(
    size: RunSize, num_tokens: int, room: Room, chunk_size: int | None = None
) -> Layout:
    """The largest chunk, and then the largest group, that there is room for.

    Beside a gradient w.r.t. the head the workspaces may take as much memory as it does: that gives
    longer groups.  A given chunk has the shortest group.
    """
    bytes_of_all = 0
    if chunk_size is None:
        bytes_of_all = min(size.dweight_bytes, room.all)
    if chunk_size is None:
        each = max(1, workspace_bytes(size, Layout(1, size.chunks_in_group)))
        chunk_size = min(MAX_CHUNK, max(1, room.workspaces // each))
        if chunk_size >= 128:
            chunk_size -= chunk_size % 128  # whole tiles of the GEMMs
    num_tokens = max(1, num_tokens)
    chunk, group = min(chunk_size, num_tokens), size.chunks_in_group * chunk_size
    if size.has_dlogits:
        logits = workspace_bytes(size, Layout(chunk, 0))
        longer = (bytes_of_all - logits) // (size.operand_bytes * size.width)
        group = max(group, longer - longer % chunk)
    return Layout(chunk, min(group, num_tokens))


def room_on(device: torch.device, reserved: int, alone: bool = True) -> Room:
    """Room for a run's workspaces on a device, by what is free there at this time.

    Args:
        reserved: bytes that the run may take besides, for finished gradients and kept tokens.
        alone: False where ranks share the vocabulary.  They need equal chunks although their free
            memory differs, so the budget is then a constant.
    """
    if device.type != "cuda":
        return Room(CPU_BUDGET, 0)
    if not alone or torch.cuda.is_current_stream_capturing():
        return Room(GPU_BUDGET, 0)
    return room_beside(free_bytes(device) - reserved)


def room_beside(num_free: int) -> Room:
    """Room for a run's workspaces on a GPU with so many bytes free."""
    num_free = max(0, num_free)
    return Room(min(GPU_BUDGET, int(SHARE_OF_FREE * num_free)), num_free // 8)


def free_bytes(device: torch.device) -> int:
    """Bytes that can still be allocated on a GPU: the driver's and those PyTorch holds unused."""
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + unused
