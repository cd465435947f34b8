"""Triton programs that find the k largest entries of each row.

``block_maxima`` reads a row once and keeps the largest entry of every block of columns.  The k
largest entries lie in the k blocks with the largest maxima (of equal maxima the first), so
``largest`` runs twice: over the maxima, to choose blocks, and over the entries of those blocks.

``largest`` holds a whole list of entries in the registers of one program.  It finds the k-th
largest bit by bit, by counting the entries that reach a trial value, and writes what reaches it in
the order of the columns, each entry to the place that a cumulative sum gives it.  So the result
never depends on the order in which threads run.  ``order_by_value`` then sorts the few that are
left.

Dimension key:  C rows, W columns, K entries wanted of a row, B blocks in a row, L blocks in a list
"""

import triton
import triton.language as tl

from fused_sd.kernels.programs.rows import load_logits


@triton.jit
def sort_key(x):
    """fp32 numbers as uint32 in the same order: -0 equals 0, and NaN is above all others."""
    bits = tl.where(x == 0, 0.0, x).to(tl.uint32, bitcast=True)
    key = bits ^ tl.where(bits >= 0x80000000, 0xFFFFFFFF, 0x80000000)
    return tl.where(x == x, key, 0xFFFFFFFF)


@triton.jit
def kth_largest(keys, k):
    """The k-th largest of uint32 keys: the largest number that at least k of them reach."""
    found, bit = tl.full([], 0, tl.uint32), tl.full([], 0x80000000, tl.uint32)
    for _ in range(32):
        enough = tl.sum((keys >= found | bit).to(tl.int32), axis=0) >= k
        found = tl.where(enough, found | bit, found)
        bit = bit >> 1
    return found


@triton.jit
def columns_of_blocks(blocks, BLOCK: tl.constexpr):
    """Columns (blocks, BLOCK) of blocks of columns."""
    return blocks[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]


@triton.jit
def columns_of_list(position, blocks_ptr, num_listed, BLOCK: tl.constexpr):
    """Columns of the entries at some positions of a list, and which positions the list has.

    The list is made of the blocks at ``blocks_ptr``, one after the other; without blocks it is the
    whole row.  Blocks ascend, and so do the columns.
    """
    exists = position // BLOCK < num_listed // BLOCK
    columns = position
    if blocks_ptr is not None:
        block = tl.load(blocks_ptr + position // BLOCK, mask=exists, other=0)
        columns = block.to(tl.int32) * BLOCK + position % BLOCK
    return columns, exists


@triton.jit
def load_keys(
    position,
    row_ptr,
    num_columns,
    blocks_ptr,
    num_listed,
    BLOCK: tl.constexpr,
):
    """Columns and sort keys of the entries at some positions of a list; 0 where there is none."""
    columns, exists = columns_of_list(position, blocks_ptr, num_listed, BLOCK)
    inside = exists & (columns < num_columns)
    x = tl.load(row_ptr + columns, mask=inside, other=0.0)
    return columns, tl.where(inside, sort_key(x), 0)  # below the key of -inf


@triton.jit
def block_maxima(
    rows_ptr,  # (C, W) fp32 logits, unit stride in the columns
    stride,  # elements from one row of the logits to the next
    num_columns,  # W
    out_ptr,  # (C, B) fp32, contiguous, written: largest logit of every block of columns
    num_blocks,  # B
    num_segments,  # programs for each row
    BLOCK: tl.constexpr,  # columns in a block
    SEGMENT: tl.constexpr,  # blocks in a segment
):
    """The largest logit of every block of columns; NaN counts as infinity.

    One program for each segment of a row.  ``top_k`` in ``kernels/selection.py`` launches it where
    a row is longer than ``largest`` can hold, or much longer than the chosen blocks together.
    """
    row = (tl.program_id(0) // num_segments).to(tl.int64)
    blocks = tl.program_id(0) % num_segments * SEGMENT + tl.arange(0, SEGMENT)
    z = load_logits(rows_ptr + row * stride, columns_of_blocks(blocks, BLOCK), num_columns)
    z = tl.where(z == z, z, float("inf"))  # tl.max skips NaN
    tl.store(out_ptr + row * num_blocks + blocks, tl.max(z, axis=1), mask=blocks < num_blocks)


@triton.jit
def largest(
    values_ptr,  # (C, W) fp32, unit stride in the columns
    stride,  # elements from one row of the values to the next
    num_columns,  # W
    blocks_ptr,  # (C, L) int64, contiguous, ascending: blocks in the list; None: the whole row
    num_listed,  # entries in a row's list: L * BLOCK, without blocks W
    k,  # K, at most the number of listed entries
    out_ptr,  # (C, K) int64, contiguous, written: columns of the k largest, ascending
    BLOCK: tl.constexpr,  # columns in a block; 1 without blocks
    LIST: tl.constexpr,  # num_listed or the next power of 2: entries held in registers
    TILE: tl.constexpr,  # entries that are loaded again at a time, to be written
):
    """Columns of the k largest listed values of a row; of equal values the first columns.

    One program a row, because a threshold needs all entries of the list.  ``top_k`` in
    ``kernels/selection.py`` launches it for entries, and before that for block maxima.
    """
    row = tl.program_id(0).to(tl.int64)
    row_ptr = values_ptr + row * stride
    if blocks_ptr is not None:
        blocks_ptr += row * (num_listed // BLOCK)
    _, listed = load_keys(tl.arange(0, LIST), row_ptr, num_columns, blocks_ptr, num_listed, BLOCK)
    threshold = kth_largest(listed, k)
    # entries above the threshold are all taken, of those that equal it the first few
    ties_wanted = k - tl.sum((listed > threshold).to(tl.int32), axis=0)
    num_above = tl.full([], 0, tl.int32)
    num_tied = tl.full([], 0, tl.int32)
    for start in range(0, num_listed, TILE):
        position = start + tl.arange(0, TILE)
        columns, keys = load_keys(position, row_ptr, num_columns, blocks_ptr, num_listed, BLOCK)
        above, tied = (keys > threshold).to(tl.int32), (keys == threshold).to(tl.int32)
        counts = tl.cumsum((above << 16) + tied, axis=0)  # one sum for both, each below 2**16
        ties = num_tied + (counts & 0xFFFF)
        place = num_above + (counts >> 16) + tl.minimum(ties, ties_wanted) - 1
        taken = (above > 0) | ((tied > 0) & (ties <= ties_wanted))
        tl.store(out_ptr + row * k + place, columns.to(out_ptr.dtype.element_ty), mask=taken)
        num_above += tl.sum(above, axis=0)
        num_tied += tl.sum(tied, axis=0)


@triton.jit
def order_by_value(
    values_ptr,  # (C, W) fp32, unit stride in the columns
    stride,  # elements from one row of the values to the next
    ids_ptr,  # (C, K) int64, contiguous, ascending: columns
    k,  # K
    out_ptr,  # (C, K) int64, contiguous, written: the columns, those of the largest values first
    PLACES: tl.constexpr,  # K or the next power of 2
    PIECE: tl.constexpr,  # entries that all others are compared with at a time
):
    """Columns of a row in the order of their values; of equal values the first column leads.

    One program a row.  An entry's place is the number of entries that come before it.  ``top_k`` in
    ``kernels/selection.py`` launches it for what ``largest`` has found.
    """
    row = tl.program_id(0).to(tl.int64)
    values_ptr, ids_ptr, out_ptr = values_ptr + row * stride, ids_ptr + row * k, out_ptr + row * k
    place = tl.arange(0, PLACES)
    ids = tl.load(ids_ptr + place, mask=place < k, other=0)
    keys = sort_key(tl.load(values_ptr + ids, mask=place < k, other=0.0))
    before = tl.zeros([PLACES], tl.int32)
    for start in range(0, k, PIECE):
        other = start + tl.arange(0, PIECE)
        columns = tl.load(ids_ptr + other, mask=other < k, other=0)
        others = sort_key(tl.load(values_ptr + columns, mask=other < k, other=0.0))
        is_tied = (others[None, :] == keys[:, None]) & (other[None, :] < place[:, None])
        leads = (others[None, :] > keys[:, None]) | is_tied
        before += tl.sum((leads & (other < k)[None, :]).to(tl.int32), axis=1)
    tl.store(out_ptr + before, ids, mask=place < k)
