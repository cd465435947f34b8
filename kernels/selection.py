"""Largest logits and gradient entries worth keeping, in Triton: the twin of
``fused_sd/torch_kernels/selection.py``.

Both modules have the same functions with the same arguments and results; the twin's docstrings
describe the arguments.  A row is read once from memory, by blocks of columns, by as many programs
as it has segments.  What is sought lies in few of the blocks, and a second program of the row holds
all entries of those blocks in registers and searches them.

Dimension key:  C rows of logits, R rows of a gradient, W and V their columns
"""

import functools
from typing import Any

import torch
import triton
from torch import Tensor

from fused_sd import checks
from fused_sd.kernels.programs import selection as programs
from fused_sd.kernels.programs import top_k as top_k_programs
from fused_sd.kernels.tuning import launch, launch_for
from fused_sd.torch_kernels.selection import Selection

BLOCKS = 128, 64, 32, 16, 8  # sizes that a block of columns may have
LIST = 16384  # most entries that one program holds in registers: 32 for each of 512 threads
TILE = 1024  # entries that a program loads again at a time, to write those that it found
PIECE = 16  # entries that all others of a row are compared with at a time
SEGMENT = 4096  # columns whose blocks one program reads


def top_k(logits: Tensor, k: int) -> Tensor:
    """Ids of the k largest logits of each row, largest first, equal ones by id: (C, k).

    They lie in the k blocks of columns with the largest maxima (of equal maxima the first): any
    entry outside has at least k entries before it, the maxima of those blocks.
    """
    num_rows, num_columns = logits.shape
    block = _block_for(k, num_columns)
    if num_columns <= LIST and num_columns <= 4 * k * block:
        ids = _largest(logits, k)
    elif block:
        maxima = logits.new_empty((num_rows, triton.cdiv(num_columns, block)))
        _read_blocks(top_k_programs.block_maxima, logits, maxima, block, num_columns=num_columns)
        ids = _largest(logits, k, _largest(maxima, k), block)
    else:  # a list of thousands of entries is too long for one program, and rare: sort the row
        return logits.sort(dim=-1, descending=True, stable=True).indices[:, :k]
    ordered = torch.empty_like(ids)
    launch(
        top_k_programs.order_by_value,
        num_rows,
        logits,
        values_ptr=logits,
        stride=logits.stride(0),
        ids_ptr=ids,
        k=k,
        out_ptr=ordered,
        PLACES=triton.next_power_of_2(k),
        PIECE=PIECE,
        num_warps=_warps_for(triton.next_power_of_2(k) * PIECE),
    )
    return ordered


def select(gradient: Tensor, share: float, most: int) -> Selection:
    """The fewest entries of each row that leave at most a share of its norm; see the twin."""
    num_rows, vocab = gradient.shape
    most = min(most, vocab)
    block = _block_for(most, vocab)
    if not block:
        checks.fail("most", f"leave a list of at most {LIST} entries", most, "such rows are dense")
    num_blocks, listed = triton.cdiv(vocab, block), _list_sizes(block, most, vocab)[1]
    wide = torch.empty(0, device=gradient.device)
    statistics = wide.new_empty((3, num_rows, num_blocks))
    _read_blocks(
        programs.block_statistics,
        gradient,
        statistics,
        block,
        num_readable=_readable(gradient),
        num_columns=vocab,
    )
    selection = Selection(
        columns=wide.new_empty((num_rows, most), dtype=torch.int32),
        values=wide.new_empty((num_rows, most)),
        count=wide.new_empty(num_rows, dtype=torch.int64),
        norm=wide.new_empty(num_rows),
        dropped=wide.new_empty(num_rows),
        dropped_mass=wide.new_empty(num_rows),
    )
    kept = {
        "columns_ptr": selection.columns,
        "values_ptr": selection.values,
        "count_ptr": selection.count,
        "norm_ptr": selection.norm,
        "dropped_ptr": selection.dropped,
        "dropped_mass_ptr": selection.dropped_mass,
        "num_columns": vocab,
        "most": most,
    }
    launch(
        programs.find_candidates,
        num_rows,
        gradient,
        **kept,
        gradient_ptr=gradient,
        stride=gradient.stride(0),
        statistics_ptr=statistics,
        num_blocks=num_blocks,
        blocks_ptr=torch.empty_like(selection.columns),
        BLOCK=block,
        BLOCKS=triton.next_power_of_2(num_blocks),
        LIST=listed,
        TILE=min(listed, TILE),
        num_warps=_warps_for(listed),
    )
    places = triton.next_power_of_2(most)
    launch(
        programs.keep_fewest,
        num_rows,
        gradient,
        **kept,
        share=share,
        MOST=places,
        PIECE=PIECE,
        num_warps=_warps_for(places * PIECE),
    )
    return selection


def trim(selection: Selection, smallest: Tensor, is_dense: Tensor) -> Selection:
    """A selection without its values of small magnitude, and without all those of some rows."""
    num_rows, most = selection.values.shape
    trimmed = selection._replace(
        values=torch.empty_like(selection.values),
        count=torch.empty_like(selection.count),
        dropped=torch.empty_like(selection.dropped),
        dropped_mass=torch.empty_like(selection.dropped_mass),
    )
    places = triton.next_power_of_2(max(most, 1))
    launch(
        programs.trim,
        num_rows,
        selection.values,
        values_ptr=selection.values,
        dropped_ptr=selection.dropped,
        dropped_mass_ptr=selection.dropped_mass,
        smallest_ptr=smallest,
        is_dense_ptr=is_dense.view(torch.uint8),
        kept_ptr=trimmed.values,
        count_ptr=trimmed.count,
        all_dropped_ptr=trimmed.dropped,
        all_dropped_mass_ptr=trimmed.dropped_mass,
        most=most,
        MOST=places,
        num_warps=_warps_for(places),
    )
    return trimmed


def compact(selection: Selection, num_values: int) -> tuple[Tensor, Tensor]:
    """Columns (E,) and values (E,) of a selection, row by row, without the places not used."""
    num_rows, most = selection.values.shape
    columns = selection.columns.new_empty(num_values)
    values = selection.values.new_empty(num_values)
    places = triton.next_power_of_2(max(most, 1))
    launch(
        programs.compact,
        num_rows,
        selection.values,
        columns_ptr=selection.columns,
        values_ptr=selection.values,
        count_ptr=selection.count,
        ends_ptr=selection.count.cumsum(0),
        out_columns_ptr=columns,
        out_values_ptr=values,
        most=most,
        MOST=places,
        num_warps=_warps_for(places),
    )
    return columns, values


def _largest(values: Tensor, k: int, blocks: Tensor | None = None, block: int = 1) -> Tensor:
    """Columns of the k largest values of each row, ascending: (C, k) int64.

    Args:
        values: (C, W) fp32.
        blocks: (C, L) int64, ascending: only these blocks of columns are searched; None: whole row.
        block: columns in a block.
    """
    num_rows, num_columns = values.shape
    num_listed = num_columns if blocks is None else k * block
    ids = torch.empty((num_rows, k), dtype=torch.int64, device=values.device)
    size = triton.next_power_of_2(num_listed)
    launch(
        top_k_programs.largest,
        num_rows,
        values,
        values_ptr=values,
        stride=values.stride(0),
        num_columns=num_columns,
        blocks_ptr=blocks,
        num_listed=num_listed,
        k=k,
        out_ptr=ids,
        BLOCK=block,
        LIST=size,
        TILE=min(size, TILE),
        num_warps=_warps_for(size),
    )
    return ids


def _read_blocks(program: Any, rows: Tensor, out: Tensor, block: int, **columns: int) -> None:
    """Launch a program that writes numbers of every block of columns: ``out`` (..., R, blocks)."""
    num_rows, num_columns = rows.shape
    num_segments = triton.cdiv(num_columns, SEGMENT)
    launch(
        program,
        num_rows * num_segments,
        rows,
        rows_ptr=rows,
        stride=rows.stride(0),
        **columns,
        out_ptr=out,
        num_blocks=out.shape[-1],
        num_segments=num_segments,
        BLOCK=block,
        SEGMENT=SEGMENT // block,
        num_warps=launch_for(program.__name__, rows.device).num_warps,
    )


def _readable(rows: Tensor) -> int:
    """Columns of every row that may be read: a multiple of 16 where the memory goes that far.

    Loads of 16 bytes need such a multiple, and the gradient is a slice of a wider workspace.
    """
    num_rows, num_columns = rows.shape
    padded = triton.cdiv(num_columns, 16) * 16
    end = rows.storage_offset() + (num_rows - 1) * rows.stride(0) + padded
    allocated = rows.untyped_storage().nbytes() // rows.element_size()
    return padded if end <= allocated else num_columns


def _block_for(num_entries: int, num_columns: int) -> int:
    """Columns of a block for which the list of blocks and the list of their entries are short.

    Returns:
        One of BLOCKS, or 0 where one of the two lists would be longer than LIST.
    """
    sizes = {block: _list_sizes(block, num_entries, num_columns) for block in BLOCKS}
    block = min(BLOCKS, key=lambda block: sum(sizes[block]))
    return block if max(sizes[block]) <= LIST else 0


def _list_sizes(block: int, num_entries: int, num_columns: int) -> tuple[int, int]:
    """Lengths of two lists, as powers of 2: a row's blocks, and the entries of chosen blocks."""
    num_blocks = triton.cdiv(num_columns, block)
    listed = min(num_entries, num_blocks) * block
    return triton.next_power_of_2(num_blocks), triton.next_power_of_2(listed)


def _warps_for(list_size: int) -> int:
    """Warps of a program that holds a list in registers: 16 entries a thread, at most 32."""
    return min(max(list_size // 16, 128), 512) // _warp_size()


@functools.cache
def _warp_size() -> int:
    """Threads of a warp: 64 on AMD's data-centre GPUs, else 32."""
    if triton.knobs.runtime.interpret:
        return 32
    return int(triton.runtime.driver.active.get_current_target().warp_size)
