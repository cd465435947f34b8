"""Which entries of a row count, in Triton: the twin of ``fused_sd/torch_kernels/selection.py``.

Dimension key:  C rows of logits, R rows of a gradient, W and V their columns
"""

import torch
import triton
from torch import Tensor

from fused_sd import checks
from fused_sd.kernels.launching import launch
from fused_sd.kernels.programs import selection as programs
from fused_sd.kernels.tuning import launch_for
from fused_sd.torch_kernels.selection import Selection

BLOCKS = 128, 64, 32, 16, 8  # columns whose largest entry stands for them
LIST = 16384  # entries that one program searches, in registers: 32 for each of 512 threads
TILE = 1024  # entries that it looks at again at a time, to write what was found
PIECE = 16  # candidates with which all of a row are compared at a time
SEGMENT = 4096  # columns whose blocks one program visits


def top_k(logits: Tensor, k: int) -> Tensor:
    """Ids of the k largest logits of each row, largest first, equal ones by id: (C, k).

    They lie in the k blocks of columns with the largest maxima, of equal ones the first: an entry
    outside has at least k entries before it, the largest of each of those blocks.
    """
    num_rows, num_columns = logits.shape
    block = _block_for(k, num_columns)
    if num_columns <= LIST and num_columns <= 4 * k * block:
        ids = _largest(logits, k)
    elif block:
        maxima = logits.new_empty((num_rows, triton.cdiv(num_columns, block)))
        _visit_blocks(programs.block_maxima, logits, maxima, num_columns, block)
        ids = _largest(logits, k, _largest(maxima, k), block)
    else:  # thousands of entries: a sort is exact, and nobody waits for it
        return logits.sort(dim=-1, descending=True, stable=True).indices[:, :k]
    order = logits.gather(1, ids).sort(dim=-1, descending=True, stable=True).indices
    return ids.gather(1, order)


def select(gradient: Tensor, share: float, most: int) -> Selection:
    """The fewest entries of each row whose complement is within budget; see the twin."""
    num_rows, vocab = gradient.shape
    most = min(most, vocab)
    block = _block_for(most, vocab)
    if not block:
        checks.fail("most", f"leave a list of at most {LIST} entries", most, "such rows are dense")
    num_blocks, listed = triton.cdiv(vocab, block), _list_sizes(block, most, vocab)[1]
    wide = torch.empty(0, device=gradient.device)
    statistics = wide.new_empty((3, num_rows, num_blocks))
    readable = _readable(gradient)
    _visit_blocks(programs.block_statistics, gradient, statistics, readable, block, vocab)
    selection = Selection(
        columns=wide.new_empty((num_rows, most), dtype=torch.int32),
        values=wide.new_empty((num_rows, most)),
        count=wide.new_empty(num_rows, dtype=torch.int64),
        norm=wide.new_empty(num_rows),
        dropped=wide.new_empty(num_rows),
        dropped_mass=wide.new_empty(num_rows),
    )
    launch(
        programs.candidates,
        num_rows,
        *(gradient, gradient.stride(0), vocab, statistics, num_blocks, most),
        *(torch.empty_like(selection.columns), *selection),
        BLOCK=block,
        BLOCKS=triton.next_power_of_2(num_blocks),
        LIST=listed,
        TILE=min(listed, TILE),
        num_warps=_warps_for(listed),
    )
    places = triton.next_power_of_2(most)
    launch(
        programs.fewest,
        num_rows,
        *(*selection, share, most, vocab),
        MOST=places,
        PIECE=PIECE,
        num_warps=_warps_for(places * PIECE),
    )
    return selection


def _largest(values: Tensor, k: int, blocks: Tensor | None = None, block: int = 1) -> Tensor:
    """Columns of the k largest of each row, ascending, where given from these blocks: (C, k)."""
    num_rows, num_columns = values.shape
    num_listed = num_columns if blocks is None else k * block
    ids = torch.empty((num_rows, k), dtype=torch.int64, device=values.device)
    size = triton.next_power_of_2(num_listed)
    launch(
        programs.largest,
        num_rows,
        *(values, values.stride(0), num_columns, ids if blocks is None else blocks),
        *(num_listed, k, ids),
        HAS_BLOCKS=blocks is not None,
        BLOCK=block,
        LIST=size,
        TILE=min(size, TILE),
        num_warps=_warps_for(size),
    )
    return ids


def _visit_blocks(
    program, rows: Tensor, out: Tensor, readable: int, block: int, *more: int
) -> None:
    """Write numbers (..., rows, number of blocks) of every block of columns."""
    num_rows, num_columns = rows.shape
    num_segments = triton.cdiv(num_columns, SEGMENT)
    launch(
        program,
        num_rows * num_segments,
        *(rows, rows.stride(0), readable, out, out.shape[-1], num_segments, *more),
        BLOCK=block,
        SEGMENT=SEGMENT // block,
        num_warps=launch_for(program.__name__, rows.device).num_warps,
    )


def _readable(rows: Tensor) -> int:
    """Columns of every row that may be read, in pieces of 16 bytes where padding allows it."""
    num_rows, num_columns = rows.shape
    padded = triton.cdiv(num_columns, 16) * 16
    end = rows.storage_offset() + (num_rows - 1) * rows.stride(0) + padded
    room = rows.untyped_storage().nbytes() // rows.element_size()
    return padded if end <= room else num_columns


def _block_for(num_entries: int, num_columns: int) -> int:
    """Columns of a block, so that the list of blocks and that of entries in some are short.

    Returns 0 where one of them is longer than a list may be.
    """
    sizes = {block: _list_sizes(block, num_entries, num_columns) for block in BLOCKS}
    block = min(BLOCKS, key=lambda block: sum(sizes[block]))
    return block if max(sizes[block]) <= LIST else 0


def _list_sizes(block: int, num_entries: int, num_columns: int) -> tuple[int, int]:
    num_blocks = triton.cdiv(num_columns, block)
    listed = min(num_entries, num_blocks) * block
    return triton.next_power_of_2(num_blocks), triton.next_power_of_2(listed)


def _warps_for(list_size: int) -> int:
    """Of a program that holds a list in registers: 16 entries for a thread, 32 at most."""
    return min(max(list_size // 512, 4), 16)
