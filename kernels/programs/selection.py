"""The programs behind ``top_k`` and ``select``: each finds the largest entries of one row.

A row is read once, by blocks of columns, and of each block its largest entry is kept.  What is
sought lies in few of the blocks, and those fit the registers of one program.  A threshold is found
bit by bit, by counting; what reaches it is written in the order of its columns, each entry at the
place that a cumulative sum names.  Nothing depends on the order in which threads come by.
"""

import triton
import triton.language as tl

from fused_sd.kernels.programs.rows import load

SMALLEST_NORMAL = tl.constexpr(23)  # rank of 2**-126 among fp32's powers of two, from 2**-149 on
INFINITY = tl.constexpr(277)  # the rank of what follows 2**127


@triton.jit
def sort_key(x):
    """fp32 numbers as integers of the same order: -0 is 0, and NaN is above all others."""
    bits = tl.where(x == 0, 0.0, x).to(tl.uint32, bitcast=True)
    key = bits ^ tl.where(bits >= 0x80000000, 0xFFFFFFFF, 0x80000000)
    return tl.where(x == x, key, 0xFFFFFFFF)


@triton.jit
def kth_largest(keys, k):
    """The largest key that at least k keys reach."""
    found, bit = tl.full([], 0, tl.uint32), tl.full([], 0x80000000, tl.uint32)
    for _ in range(32):
        enough = tl.sum((keys >= found | bit).to(tl.int32), axis=0) >= k
        found = tl.where(enough, found | bit, found)
        bit = bit >> 1
    return found


@triton.jit
def columns_of(at, blocks_ptr, num_listed, HAS_BLOCKS: tl.constexpr, BLOCK: tl.constexpr):
    """Columns of a list's entries in their row, ascending, and which the list has.

    Without blocks the list is the row.
    """
    exists = at // BLOCK < num_listed // BLOCK
    columns = at
    if HAS_BLOCKS:
        block = tl.load(blocks_ptr + at // BLOCK, mask=exists, other=0)
        columns = block.to(tl.int32) * BLOCK + at % BLOCK
    return columns, exists


@triton.jit
def keys_of(
    at,
    row_ptr,
    num_columns,
    blocks_ptr,
    num_listed,
    HAS_BLOCKS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    columns, exists = columns_of(at, blocks_ptr, num_listed, HAS_BLOCKS, BLOCK)
    inside = exists & (columns < num_columns)
    x = tl.load(row_ptr + columns, mask=inside, other=0.0)
    return columns, tl.where(inside, sort_key(x), 0)  # below -inf's


@triton.jit
def largest(
    values_ptr,
    stride,
    num_columns,
    blocks_ptr,  # (rows, number of blocks) ascending: where the list's entries lie in their row
    num_listed,
    k,
    out_ptr,  # (rows, k) columns of the k largest, ascending; among equal ones the first columns
    HAS_BLOCKS: tl.constexpr,
    BLOCK: tl.constexpr,
    LIST: tl.constexpr,
    TILE: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    row_ptr = values_ptr + row * stride
    if HAS_BLOCKS:
        blocks_ptr += row * (num_listed // BLOCK)
    _, listed = keys_of(
        tl.arange(0, LIST), row_ptr, num_columns, blocks_ptr, num_listed, HAS_BLOCKS, BLOCK
    )
    threshold = kth_largest(listed, k)
    room = k - tl.sum((listed > threshold).to(tl.int32), axis=0)  # for what equals the threshold
    num_above = tl.full([], 0, tl.int32)
    num_tied = tl.full([], 0, tl.int32)
    for start in range(0, num_listed, TILE):
        at = start + tl.arange(0, TILE)
        columns, keys = keys_of(at, row_ptr, num_columns, blocks_ptr, num_listed, HAS_BLOCKS, BLOCK)
        above, tied = (keys > threshold).to(tl.int32), (keys == threshold).to(tl.int32)
        counts = tl.cumsum((above << 16) + tied, axis=0)  # one sum for both, each below 2**16
        ties = num_tied + (counts & 0xFFFF)
        place = num_above + (counts >> 16) + tl.minimum(ties, room) - 1
        taken = (above > 0) | ((tied > 0) & (ties <= room))
        tl.store(out_ptr + row * k + place, columns.to(out_ptr.dtype.element_ty), mask=taken)
        num_above += tl.sum(above, axis=0)
        num_tied += tl.sum(tied, axis=0)


@triton.jit
def block_maxima(
    logits_ptr,
    stride,
    num_columns,
    out_ptr,
    num_blocks,
    num_segments,
    BLOCK: tl.constexpr,
    SEGMENT: tl.constexpr,
):
    """The largest logit of every block of columns."""
    row = (tl.program_id(0) // num_segments).to(tl.int64)
    blocks = tl.program_id(0) % num_segments * SEGMENT + tl.arange(0, SEGMENT)
    z = load(logits_ptr + row * stride, columns_of_blocks(blocks, BLOCK), num_columns)
    z = tl.where(z == z, z, float("inf"))  # a maximum passes over NaN
    tl.store(out_ptr + row * num_blocks + blocks, tl.max(z, axis=1), mask=blocks < num_blocks)


@triton.jit
def columns_of_blocks(blocks, BLOCK: tl.constexpr):
    return blocks[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]


@triton.jit
def block_statistics(
    gradient_ptr,
    stride,
    num_readable,  # columns, with those behind the last that may be read
    out_ptr,  # (3, rows, number of blocks)
    num_blocks,
    num_segments,
    num_columns,
    BLOCK: tl.constexpr,
    SEGMENT: tl.constexpr,
):
    """Of every block of columns the largest magnitude, the sum of magnitudes and the sum."""
    row = (tl.program_id(0) // num_segments).to(tl.int64)
    blocks = tl.program_id(0) % num_segments * SEGMENT + tl.arange(0, SEGMENT)
    columns = columns_of_blocks(blocks, BLOCK)
    g = tl.load(gradient_ptr + row * stride + columns, mask=columns < num_readable, other=0.0)
    g = tl.where(columns < num_columns, g.to(tl.float32), 0.0)
    peak = tl.max(tl.where(g == g, tl.abs(g), float("inf")), axis=1)
    mask = blocks < num_blocks
    out_ptr += row * num_blocks + blocks
    per_kind = (tl.num_programs(0) // num_segments).to(tl.int64) * num_blocks
    tl.store(out_ptr, peak, mask=mask)
    tl.store(out_ptr + per_kind, tl.sum(tl.abs(g), axis=1), mask=mask)
    tl.store(out_ptr + 2 * per_kind, tl.sum(g, axis=1), mask=mask)


@triton.jit
def crowded_power(x, most):
    """The smallest power of two that at most ``most`` magnitudes reach."""
    low, high = tl.full([], 0, tl.int32), tl.full([], INFINITY, tl.int32)
    power = tl.full([], float("inf"), tl.float32)
    for _ in range(9):  # halvings of 278 ranks
        middle = (low + high) // 2
        normal = (middle - SMALLEST_NORMAL + 1) << 23
        bits = tl.where(middle < SMALLEST_NORMAL, 1 << middle, normal)
        trial = bits.to(tl.float32, bitcast=True)
        few = tl.sum((tl.abs(x) >= trial).to(tl.int32), axis=0) <= most
        power = tl.where(few, trial, power)
        high = tl.where(few, middle, high)
        low = tl.where(few, low, middle + 1)
    return power


@triton.jit
def entries_of(at, row_ptr, num_columns, blocks_ptr, num_listed, BLOCK: tl.constexpr):
    columns, exists = columns_of(at, blocks_ptr, num_listed, True, BLOCK)
    inside = exists & (columns < num_columns)
    return columns, tl.load(row_ptr + columns, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def candidates(
    gradient_ptr,
    stride,
    num_columns,
    statistics_ptr,
    num_blocks,
    most,
    blocks_ptr,  # (rows, most) scratch
    columns_ptr,  # (rows, most)
    values_ptr,
    count_ptr,
    norm_ptr,
    dropped_ptr,
    dropped_mass_ptr,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
    LIST: tl.constexpr,
    TILE: tl.constexpr,
):
    """The entries above the power of two that leaves enough few of them; sums over the others."""
    row = tl.program_id(0).to(tl.int64)
    gradient_ptr += row * stride
    blocks_ptr += row * most
    columns_ptr += row * most
    values_ptr += row * most

    # the blocks that hold every candidate: fewer than `most` blocks reach a power of two that only
    # `most` entries reach, and the smallest such power for blocks is at most that for entries
    block = tl.arange(0, BLOCKS)
    exists = block < num_blocks
    statistics_ptr += row * num_blocks + block
    per_kind = tl.num_programs(0).to(tl.int64) * num_blocks
    peaks = tl.load(statistics_ptr, mask=exists, other=0.0)
    norms = tl.load(statistics_ptr + per_kind, mask=exists, other=0.0)
    sums = tl.load(statistics_ptr + 2 * per_kind, mask=exists, other=0.0)
    norm = tl.sum(norms, axis=0)
    power = crowded_power(peaks, most)
    listed = peaks >= power
    dropped = tl.sum(tl.where(listed, 0.0, norms), axis=0)
    dropped_mass = tl.sum(tl.where(listed, 0.0, sums), axis=0)
    slot = tl.cumsum(listed.to(tl.int32), axis=0) - 1
    tl.store(blocks_ptr + slot, block, mask=listed & (slot < most))
    num_listed = tl.minimum(tl.sum(listed.to(tl.int32), axis=0), most) * BLOCK
    tl.debug_barrier()

    _, entries = entries_of(
        tl.arange(0, LIST), gradient_ptr, num_columns, blocks_ptr, num_listed, BLOCK
    )
    power = tl.maximum(power, crowded_power(entries, most))
    num_candidates = tl.full([], 0, tl.int32)
    for start in range(0, num_listed, TILE):
        at = start + tl.arange(0, TILE)
        columns, g = entries_of(at, gradient_ptr, num_columns, blocks_ptr, num_listed, BLOCK)
        candidate = tl.abs(g) >= power
        dropped += tl.sum(tl.where(candidate, 0.0, tl.abs(g)), axis=0)
        dropped_mass += tl.sum(tl.where(candidate, 0.0, g), axis=0)
        place = num_candidates + tl.cumsum(candidate.to(tl.int32), axis=0) - 1
        candidate = candidate & (place < most)
        tl.store(columns_ptr + place, columns, mask=candidate)
        tl.store(values_ptr + place, g, mask=candidate)
        num_candidates += tl.sum(candidate.to(tl.int32), axis=0)
    finite = norm < float("inf")  # else there may be any number of them
    tl.store(count_ptr + row, tl.where(finite, num_candidates, 0).to(tl.int64))
    tl.store(norm_ptr + row, norm)
    tl.store(dropped_ptr + row, tl.where(finite, dropped, float("nan")))
    tl.store(dropped_mass_ptr + row, dropped_mass)


@triton.jit
def fewest(
    columns_ptr,  # (rows, most), and everything else as `candidates` left it
    values_ptr,
    count_ptr,
    norm_ptr,
    dropped_ptr,
    dropped_mass_ptr,
    share,
    most,
    num_columns,
    MOST: tl.constexpr,
    PIECE: tl.constexpr,
):
    """Drop every candidate for which the budget holds all that are no larger than it."""
    row = tl.program_id(0).to(tl.int64)
    columns_ptr += row * most
    values_ptr += row * most
    num_candidates = tl.load(count_ptr + row).to(tl.int32)
    budget = share * tl.load(norm_ptr + row)
    dropped, dropped_mass = tl.load(dropped_ptr + row), tl.load(dropped_mass_ptr + row)
    place = tl.arange(0, MOST)
    exists = place < num_candidates
    columns = tl.load(columns_ptr + place, mask=exists, other=0)
    g = tl.load(values_ptr + place, mask=exists, other=0.0)
    up_to = tl.zeros([MOST], tl.float32)
    for start in range(0, num_candidates, PIECE):
        piece = start + tl.arange(0, PIECE)
        other = tl.load(values_ptr + piece, mask=piece < num_candidates, other=0.0)
        other = tl.abs(other)[None, :]
        up_to += tl.sum(tl.where(other <= tl.abs(g)[:, None], other, 0.0), axis=1)
    up_to += dropped
    kept, gone = exists & (up_to > budget), exists & (up_to <= budget)
    count = tl.sum(kept.to(tl.int32), axis=0)
    before = tl.cumsum(kept.to(tl.int32), axis=0)
    place = tl.where(kept, before - 1, count + place - before)  # each place once
    tl.debug_barrier()  # all have read
    tl.store(columns_ptr + place, tl.where(kept, columns, num_columns), mask=place < most)
    tl.store(values_ptr + place, tl.where(kept, g, 0.0), mask=place < most)
    tl.store(count_ptr + row, count.to(tl.int64))
    largest_gone = tl.max(tl.where(gone, up_to, 0.0), axis=0)  # to the bit as it was compared
    tl.store(dropped_ptr + row, tl.where(count < num_candidates, largest_gone, dropped))
    tl.store(dropped_mass_ptr + row, dropped_mass + tl.sum(tl.where(gone, g, 0.0), axis=0))
