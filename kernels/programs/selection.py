"""Triton programs that keep the few entries of a gradient that matter, row by row.

Three programs choose them one after the other, and only the first reads the whole gradient:

1. ``block_statistics`` reads a row once and sums up every block of columns in three numbers.
2. ``find_candidates`` looks at blocks whose largest magnitude reaches a power of two.  Candidates
   are the entries that reach the smallest power of two which at most ``most`` entries reach.
3. ``keep_fewest`` drops the smallest candidates again while the budget allows it.

Two more take what the rows of a group keep: ``trim`` drops values once more, by a magnitude that
the whole group decides, and ``compact`` writes what is left without gaps.

What is dropped is summed as such, never as the difference of two larger sums.  Entries are written
in the order of their columns, each to the place that a cumulative sum gives it, so the result never
depends on the order in which threads run.

Dimension key:  R rows of a gradient, V columns, B blocks in a row, M entries that may be kept of a
                row (``most``), E values of all rows
"""

import triton
import triton.language as tl

from fused_sd.kernels.programs.top_k import columns_of_blocks, columns_of_list

# fp32's powers of two are ranked from 0 (2**-149) to 276 (2**127)
SMALLEST_NORMAL = tl.constexpr(23)  # rank of 2**-126; smaller powers are subnormal
INFINITY = tl.constexpr(277)  # rank of infinity, whose bits follow those of 2**127


@triton.jit
def candidate_threshold(x, most):
    """The smallest power of two that the magnitudes of at most ``most`` entries reach.

    Found by bisection over the ranks of fp32's powers of two.
    """
    low, high = tl.full([], 0, tl.int32), tl.full([], INFINITY, tl.int32)
    power = tl.full([], float("inf"), tl.float32)
    for _ in range(9):  # 2**9 > 278 ranks
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
def load_entries(position, row_ptr, num_columns, blocks_ptr, num_listed, BLOCK: tl.constexpr):
    """Columns and fp32 values of the entries at some positions of a list; 0 where there is none."""
    columns, exists = columns_of_list(position, blocks_ptr, num_listed, BLOCK)
    inside = exists & (columns < num_columns)
    return columns, tl.load(row_ptr + columns, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def block_statistics(
    rows_ptr,  # (R, V) bf16, fp16 or fp32 gradient, unit stride in the columns
    stride,  # elements from one row of the gradient to the next
    num_readable,  # columns that may be read: V, or V padded so that loads are aligned
    out_ptr,  # (3, R, B) fp32, contiguous, written: max |g|, sum |g| and sum g of every block
    num_blocks,  # B
    num_segments,  # programs for each row
    num_columns,  # V; what lies behind counts as 0
    BLOCK: tl.constexpr,  # columns in a block
    SEGMENT: tl.constexpr,  # blocks in a segment
):
    """Largest magnitude, sum of magnitudes and sum of every block; a maximum of NaN is infinity.

    One program for each segment of a row.  ``select`` in ``kernels/selection.py`` launches it
    first, so that the gradient is read once, in parallel, and all else reads a few blocks of it.
    """
    row = (tl.program_id(0) // num_segments).to(tl.int64)
    blocks = tl.program_id(0) % num_segments * SEGMENT + tl.arange(0, SEGMENT)
    columns = columns_of_blocks(blocks, BLOCK)
    g = tl.load(rows_ptr + row * stride + columns, mask=columns < num_readable, other=0.0)
    g = tl.where(columns < num_columns, g.to(tl.float32), 0.0)
    peak = tl.max(tl.where(g == g, tl.abs(g), float("inf")), axis=1)
    mask = blocks < num_blocks
    out_ptr += row * num_blocks + blocks
    per_statistic = (tl.num_programs(0) // num_segments).to(tl.int64) * num_blocks
    tl.store(out_ptr, peak, mask=mask)
    tl.store(out_ptr + per_statistic, tl.sum(tl.abs(g), axis=1), mask=mask)
    tl.store(out_ptr + 2 * per_statistic, tl.sum(g, axis=1), mask=mask)


@triton.jit
def find_candidates(
    gradient_ptr,  # (R, V) bf16, fp16 or fp32, unit stride in the columns
    stride,  # elements from one row of the gradient to the next
    num_columns,  # V
    statistics_ptr,  # (3, R, B) fp32, contiguous, as block_statistics wrote it
    num_blocks,  # B
    most,  # M
    blocks_ptr,  # (R, M) int32, contiguous, scratch: the blocks that hold candidates
    columns_ptr,  # (R, M) int32, contiguous, written: columns of the candidates, ascending
    values_ptr,  # (R, M) fp32, contiguous, written: the candidates
    count_ptr,  # (R,) int64, written: number of candidates; 0 if the norm is not finite
    norm_ptr,  # (R,) fp32, written: sum |g| of the row
    dropped_ptr,  # (R,) fp32, written: sum |g| of the others; NaN if the norm is not finite
    dropped_mass_ptr,  # (R,) fp32, written: sum g of the others
    BLOCK: tl.constexpr,  # columns in a block
    BLOCKS: tl.constexpr,  # B or the next power of 2
    LIST: tl.constexpr,  # most entries in the listed blocks, a power of 2: held in registers
    TILE: tl.constexpr,  # entries that are loaded again at a time, to be written
):
    """The entries of a row that reach the candidates' power of two, and sums over the others.

    One program a row, because the threshold needs all listed entries.  ``select`` in
    ``kernels/selection.py`` launches it after ``block_statistics``.
    """
    row = tl.program_id(0).to(tl.int64)
    gradient_ptr += row * stride
    blocks_ptr += row * most
    columns_ptr += row * most
    values_ptr += row * most

    # List the blocks that may hold candidates.  At most `most` blocks have a maximum that reaches
    # the entries' power of two, so the smallest such power for blocks is no larger.
    block = tl.arange(0, BLOCKS)
    exists = block < num_blocks
    statistics_ptr += row * num_blocks + block
    per_statistic = tl.num_programs(0).to(tl.int64) * num_blocks
    peaks = tl.load(statistics_ptr, mask=exists, other=0.0)
    norms = tl.load(statistics_ptr + per_statistic, mask=exists, other=0.0)
    sums = tl.load(statistics_ptr + 2 * per_statistic, mask=exists, other=0.0)
    norm = tl.sum(norms, axis=0)
    power = candidate_threshold(peaks, most)
    listed = peaks >= power
    dropped = tl.sum(tl.where(listed, 0.0, norms), axis=0)
    dropped_mass = tl.sum(tl.where(listed, 0.0, sums), axis=0)
    slot = tl.cumsum(listed.to(tl.int32), axis=0) - 1
    tl.store(blocks_ptr + slot, block, mask=listed & (slot < most))
    num_listed = tl.minimum(tl.sum(listed.to(tl.int32), axis=0), most) * BLOCK
    tl.debug_barrier()  # the list is written before any thread reads it

    _, entries = load_entries(
        tl.arange(0, LIST), gradient_ptr, num_columns, blocks_ptr, num_listed, BLOCK
    )
    power = tl.maximum(power, candidate_threshold(entries, most))
    num_candidates = tl.full([], 0, tl.int32)
    for start in range(0, num_listed, TILE):
        position = start + tl.arange(0, TILE)
        columns, g = load_entries(
            position, gradient_ptr, num_columns, blocks_ptr, num_listed, BLOCK
        )
        candidate = tl.abs(g) >= power
        dropped += tl.sum(tl.where(candidate, 0.0, tl.abs(g)), axis=0)
        dropped_mass += tl.sum(tl.where(candidate, 0.0, g), axis=0)
        place = num_candidates + tl.cumsum(candidate.to(tl.int32), axis=0) - 1
        candidate = candidate & (place < most)
        tl.store(columns_ptr + place, columns, mask=candidate)
        tl.store(values_ptr + place, g, mask=candidate)
        num_candidates += tl.sum(candidate.to(tl.int32), axis=0)
    finite = norm < float("inf")  # otherwise any number of entries may reach any power
    tl.store(count_ptr + row, tl.where(finite, num_candidates, 0).to(tl.int64))
    tl.store(norm_ptr + row, norm)
    tl.store(dropped_ptr + row, tl.where(finite, dropped, float("nan")))
    tl.store(dropped_mass_ptr + row, dropped_mass)


@triton.jit
def keep_fewest(
    columns_ptr,  # (R, M) int32, contiguous, in place: columns; V in places that are not used
    values_ptr,  # (R, M) fp32, contiguous, in place: candidates; 0 in places that are not used
    count_ptr,  # (R,) int64, in place: number of candidates, then of kept entries
    norm_ptr,  # (R,) fp32, sum |g| of the row
    dropped_ptr,  # (R,) fp32, in place: sum |g| of what is dropped
    dropped_mass_ptr,  # (R,) fp32, in place: sum g of what is dropped
    share,  # float, share of the norm that may be dropped
    most,  # M
    num_columns,  # V
    MOST: tl.constexpr,  # M or the next power of 2
    PIECE: tl.constexpr,  # candidates that all others are compared with at a time
):
    """Drop every candidate that the budget allows to drop with all that are no larger than it.

    One program a row.  ``select`` in ``kernels/selection.py`` launches it last.  It is a program of
    its own because it compares all pairs of candidates and holds MOST x PIECE pairs in registers,
    where ``find_candidates`` holds its list.
    """
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
    up_to = tl.zeros([MOST], tl.float32)  # sum |g| of all entries that are no larger
    for start in range(0, num_candidates, PIECE):
        piece = start + tl.arange(0, PIECE)
        other = tl.load(values_ptr + piece, mask=piece < num_candidates, other=0.0)
        other = tl.abs(other)[None, :]
        up_to += tl.sum(tl.where(other <= tl.abs(g)[:, None], other, 0.0), axis=1)
    up_to += dropped
    kept, cut = exists & (up_to > budget), exists & (up_to <= budget)
    count = tl.sum(kept.to(tl.int32), axis=0)
    before = tl.cumsum(kept.to(tl.int32), axis=0)
    place = tl.where(kept, before - 1, count + place - before)  # kept ones first, each place once
    tl.debug_barrier()  # all threads have read what the stores overwrite
    tl.store(columns_ptr + place, tl.where(kept, columns, num_columns), mask=place < most)
    tl.store(values_ptr + place, tl.where(kept, g, 0.0), mask=place < most)
    tl.store(count_ptr + row, count.to(tl.int64))
    largest_cut = tl.max(tl.where(cut, up_to, 0.0), axis=0)  # the very sum that met the budget
    tl.store(dropped_ptr + row, tl.where(count < num_candidates, largest_cut, dropped))
    tl.store(dropped_mass_ptr + row, dropped_mass + tl.sum(tl.where(cut, g, 0.0), axis=0))


@triton.jit
def trim(
    values_ptr,  # (R, M) fp32, contiguous: values, 0 in places that are not used
    dropped_ptr,  # (R,) fp32: sum |g| of what is dropped
    dropped_mass_ptr,  # (R,) fp32: sum g of what is dropped
    smallest_ptr,  # () fp32: magnitude below which values are dropped too
    is_dense_ptr,  # (R,) uint8: 1 for a row that keeps no value and drops nothing
    kept_ptr,  # (R, M) fp32, contiguous, written: values, 0 in place of those that are gone
    count_ptr,  # (R,) int64, written: number of values kept
    all_dropped_ptr,  # (R,) fp32, written: sum |g| of all that is dropped
    all_dropped_mass_ptr,  # (R,) fp32, written: sum g of all that is dropped
    most,  # M
    MOST: tl.constexpr,  # M or the next power of 2
):
    """Drop the values of a row that are below a magnitude, or all values of a dense row.

    One program a row.  ``trim`` in ``kernels/selection.py`` launches it for a group of rows, once
    it is known which of them are dense.
    """
    row = tl.program_id(0).to(tl.int64)
    place = tl.arange(0, MOST)
    exists = place < most
    g = tl.load(values_ptr + row * most + place, mask=exists, other=0.0)
    is_dense = tl.load(is_dense_ptr + row) != 0
    kept = tl.where(is_dense | (tl.abs(g) < tl.load(smallest_ptr)), 0.0, g)
    gone = g - kept
    dropped = tl.load(dropped_ptr + row) + tl.sum(tl.abs(gone), axis=0)
    dropped_mass = tl.load(dropped_mass_ptr + row) + tl.sum(gone, axis=0)
    tl.store(kept_ptr + row * most + place, kept, mask=exists)
    tl.store(count_ptr + row, tl.sum((kept != 0).to(tl.int32), axis=0).to(tl.int64))
    tl.store(all_dropped_ptr + row, tl.where(is_dense, 0.0, dropped))
    tl.store(all_dropped_mass_ptr + row, tl.where(is_dense, 0.0, dropped_mass))


@triton.jit
def compact(
    columns_ptr,  # (R, M) int32, contiguous: columns of the values
    values_ptr,  # (R, M) fp32, contiguous: values, 0 in places that are not used
    count_ptr,  # (R,) int64: number of values of each row that are not 0
    ends_ptr,  # (R,) int64: where each row's values end among those of all rows
    out_columns_ptr,  # (E,) int32, written: the columns without gaps
    out_values_ptr,  # (E,) fp32, written: the values without gaps
    most,  # M
    MOST: tl.constexpr,  # M or the next power of 2
):
    """Write the columns and values of a row, without places not used, behind those before it.

    One program a row.  ``compact`` in ``kernels/selection.py`` launches it once for a group.
    """
    row = tl.program_id(0).to(tl.int64)
    place = tl.arange(0, MOST)
    exists = place < most
    g = tl.load(values_ptr + row * most + place, mask=exists, other=0.0)
    used = g != 0
    columns = tl.load(columns_ptr + row * most + place, mask=used, other=0)
    start = tl.load(ends_ptr + row) - tl.load(count_ptr + row)
    to = start + tl.cumsum(used.to(tl.int32), axis=0) - 1
    tl.store(out_columns_ptr + to, columns, mask=used)
    tl.store(out_values_ptr + to, g, mask=used)
