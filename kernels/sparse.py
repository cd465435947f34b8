"""Work on chosen entries in Triton: the twin of ``fused_sd/sparse.py``, same names and arguments.

Dimension key:  C rows in a chunk, R rows of a gradient, W and V columns, N tokens, D hidden size,
                K entries of a token, E entries of all tokens, M places in a row
"""

from typing import Any

import torch
import triton
from torch import Tensor

from fused_sd import checks
from fused_sd.kernels import entry_programs, selection_programs
from fused_sd.kernels.tuning import launch_for
from fused_sd.selection import Selection
from fused_sd.sparse import Entries, by_column

BLOCKS = 128, 64, 32, 16, 8  # columns whose largest entry stands for them
LIST = 16384  # entries that one program searches, in registers: 64 for each of 256 threads
TILE = 1024  # entries that it looks at again at a time, to write what was found
PIECE = 16  # candidates with which all of a row are compared at a time
SEGMENT = 4096  # columns whose blocks one program visits
LONG = 512  # entries of a column that a program of its own sums
# rows times bytes of each that a program gathers at a time, and its warps: of the few entries of
# most columns, of the many of a column that every token names, and of dot products
FEW, MANY, DOTS = (4, 4096, 4), (128, 256, 8), (16, 512, 4)


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
        _visit_blocks(selection_programs.block_maxima, logits, maxima, num_columns, block)
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
    _visit_blocks(selection_programs.block_statistics, gradient, statistics, readable, block, vocab)
    selection = Selection(
        columns=wide.new_empty((num_rows, most), dtype=torch.int32),
        values=wide.new_empty((num_rows, most)),
        count=wide.new_empty(num_rows, dtype=torch.int64),
        norm=wide.new_empty(num_rows),
        dropped=wide.new_empty(num_rows),
        spread=wide.new_empty(num_rows),
    )
    _launch(
        selection_programs.candidates,
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
    _launch(
        selection_programs.fewest,
        num_rows,
        *(*selection, share, most, vocab),
        MOST=places,
        PIECE=PIECE,
        num_warps=_warps_for(places * PIECE),
    )
    return selection


def entry_logits(hidden: Tensor, weight: Tensor, ids: Tensor) -> Tensor:
    """Products of hidden states with a few rows of the head each: (C, K) fp32; see the twin.

    A product's bits depend on its two rows alone, not on its place among the others.
    """
    hidden, weight = _rows(hidden), _rows(weight)
    num_tokens, num_entries = ids.shape
    out = torch.empty(ids.shape, dtype=torch.float32, device=hidden.device)
    tile = _tile(DOTS, hidden)
    num_tiles = triton.cdiv(num_entries, tile["BLOCK_E"])
    _launch(
        entry_programs.entry_logits,
        num_tokens * num_tiles,
        *(hidden, hidden.stride(0), weight, weight.stride(0), ids.contiguous(), out),
        *(num_entries, num_tiles, hidden.shape[1]),
        **tile,
    )
    return out


def gather_sum(
    entries: Entries,
    weight: Tensor,
    mean_row: Tensor | None,
    factor: Tensor,
    dtype: torch.dtype,
) -> Tensor:
    """Gradient by the hidden states (N, D): weighted sums of the head's rows; see the twin."""
    weight, factor = _rows(weight), factor.contiguous()
    num_tokens, (vocab, hidden_size) = factor.shape[0], weight.shape
    out = torch.empty((num_tokens, hidden_size), dtype=dtype, device=weight.device)
    tile = _tile(FEW, weight)
    num_tiles = triton.cdiv(hidden_size, tile["BLOCK_D"])
    _launch(
        entry_programs.gather_sum,
        num_tokens * num_tiles,
        *(entries.columns, entries.values, entries.starts),
        *(factor if entries.spread is None else entries.spread.contiguous(), factor),
        *(weight, weight.stride(0), vocab, factor if mean_row is None else mean_row),
        *(out, hidden_size, num_tiles),
        HAS_SPREAD=entries.spread is not None,
        **tile,
    )
    return out


def segment_sum(
    entries: Entries,
    hidden: Tensor,
    vocab: int,
    factor: Tensor,
    background: Tensor | None,
    base: Tensor | None,
    base_factor: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """Gradient by the head (V, D): weighted sums of hidden states by column; see the twin.

    A program sums a row of few entries over a wide piece of it.  For one of many, programs of
    narrow pieces gather more rows at a time; their number is known without counting such rows.
    """
    hidden = _rows(hidden)
    hidden_size = hidden.shape[1]
    by = by_column(entries, vocab)
    tokens = by.tokens[by.order]
    coefficients = entries.values[by.order] * factor[tokens]
    num_long = min(vocab, tokens.shape[0] // (LONG + 1))
    longest = (by.starts[1:] - by.starts[:-1]).topk(num_long).indices
    out = torch.empty((vocab, hidden_size), dtype=dtype, device=hidden.device)
    for num_rows, shape in ((vocab, FEW), (num_long, MANY)):
        tile = _tile(shape, hidden)
        num_tiles = triton.cdiv(hidden_size, tile["BLOCK_D"])
        _launch(
            entry_programs.segment_sum,
            num_rows * num_tiles,
            *(tokens, coefficients, by.starts, longest, hidden, hidden.stride(0)),
            *(hidden.shape[0], out if background is None else background),
            *(out if base is None else base, out.stride(0) if base is None else base.stride(0)),
            *(out if base_factor is None else base_factor, out, hidden_size, num_tiles),
            ARE_LONG=shape is MANY,
            LONG=LONG,
            HAS_BACKGROUND=background is not None,
            HAS_BASE=base is not None,
            HAS_FACTOR=base_factor is not None,
            **tile,
        )
    return out


def _largest(values: Tensor, k: int, blocks: Tensor | None = None, block: int = 1) -> Tensor:
    """Columns of the k largest of each row, ascending, where given from these blocks: (C, k)."""
    num_rows, num_columns = values.shape
    num_listed = num_columns if blocks is None else k * block
    ids = torch.empty((num_rows, k), dtype=torch.int64, device=values.device)
    size = triton.next_power_of_2(num_listed)
    _launch(
        selection_programs.largest,
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
    _launch(
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
    """Of a program that holds a list in registers: 32 entries for a thread, 64 at most."""
    return min(max(list_size // 1024, 4), 8)


def _tile(shape: tuple[int, int, int], rows: Tensor) -> dict[str, Any]:
    """Constants of a program that gathers rows in tiles."""
    num_rows, num_bytes, num_warps = shape
    width = min(num_bytes // rows.element_size(), triton.next_power_of_2(rows.shape[1]))
    return {"BLOCK_E": num_rows, "BLOCK_D": width, "num_warps": num_warps}


def _rows(matrix: Tensor) -> Tensor:
    """A matrix whose rows lie in memory as such, wherever they start."""
    return matrix if matrix.stride(1) == 1 else matrix.contiguous()


def _launch(program, num_programs: int, data: Tensor, *arguments, **constants) -> None:
    """On the GPU that holds the data, which need not be the current one."""
    if num_programs:
        with torch.cuda.device_of(data):
            program[(num_programs,)](data, *arguments, **constants)
