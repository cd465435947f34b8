"""The programs that work on chosen entries: dot products, and sums of gathered rows.

A sum of gathered rows is kept in fp32, a tile of its terms at a time in an order that only the
number of terms decides, and rounded once.
"""

import triton
import triton.language as tl


@triton.jit
def entry_logits(
    hidden_ptr,
    hidden_stride,
    weight_ptr,
    weight_stride,
    ids_ptr,
    out_ptr,
    num_entries,
    num_tiles,
    hidden_size,
    BLOCK_E: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    token = (tl.program_id(0) // num_tiles).to(tl.int64)
    entry = tl.program_id(0) % num_tiles * BLOCK_E + tl.arange(0, BLOCK_E)
    exists = entry < num_entries
    ids = tl.load(ids_ptr + token * num_entries + entry, mask=exists, other=0)
    rows_ptr = weight_ptr + ids[:, None] * weight_stride
    products = tl.zeros([BLOCK_E, BLOCK_D], tl.float32)
    for start in range(0, hidden_size, BLOCK_D):
        offs_d = start + tl.arange(0, BLOCK_D)
        inside = offs_d < hidden_size
        hidden = tl.load(hidden_ptr + token * hidden_stride + offs_d, mask=inside, other=0.0)
        both = exists[:, None] & inside[None, :]
        weight = tl.load(rows_ptr + offs_d[None, :], mask=both, other=0.0)
        products += hidden.to(tl.float32)[None, :] * weight.to(tl.float32)
    tl.store(out_ptr + token * num_entries + entry, tl.sum(products, axis=1), mask=exists)


@triton.jit
def sum_of_rows(
    index_ptr,
    coefficient_ptr,
    first,
    last,
    rows_ptr,
    stride,
    num_rows,
    offs_d,
    inside,
    BLOCK_E: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Sum of the terms' coefficients times the rows that they name; behind the rows is nothing."""
    total = tl.zeros([BLOCK_E, BLOCK_D], tl.float32)
    for start in range(first, last, BLOCK_E):
        term = start + tl.arange(0, BLOCK_E)
        index = tl.load(index_ptr + term, mask=term < last, other=num_rows).to(tl.int64)
        exists = index < num_rows
        coefficient = tl.load(coefficient_ptr + term, mask=exists, other=0.0)
        both = exists[:, None] & inside[None, :]
        row = tl.load(rows_ptr + index[:, None] * stride + offs_d[None, :], mask=both, other=0.0)
        total += coefficient[:, None] * row.to(tl.float32)
    return tl.sum(total, axis=0)


@triton.jit
def gather_sum(
    columns_ptr,
    values_ptr,
    starts_ptr,
    dropped_mass_ptr,
    factor_ptr,
    weight_ptr,
    weight_stride,
    vocab,
    mean_ptr,
    out_ptr,
    hidden_size,
    num_tiles,
    HAS_DROPPED_MASS: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    token = (tl.program_id(0) // num_tiles).to(tl.int64)
    offs_d = tl.program_id(0) % num_tiles * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = offs_d < hidden_size
    first, last = tl.load(starts_ptr + token), tl.load(starts_ptr + token + 1)
    terms = columns_ptr, values_ptr, first, last
    rows = weight_ptr, weight_stride, vocab
    total = sum_of_rows(*terms, *rows, offs_d, inside, BLOCK_E, BLOCK_D)
    if HAS_DROPPED_MASS:
        mean = tl.load(mean_ptr + offs_d, mask=inside, other=0.0)
        total += tl.load(dropped_mass_ptr + token) * mean
    total *= tl.load(factor_ptr + token)
    to = out_ptr + token * hidden_size + offs_d
    tl.store(to, total.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def segment_sum(
    tokens_ptr,
    coefficients_ptr,
    starts_ptr,
    long_ptr,
    hidden_ptr,
    hidden_stride,
    num_tokens,
    base_ptr,
    base_stride,
    base_factor_ptr,
    out_ptr,
    hidden_size,
    num_tiles,
    ARE_LONG: tl.constexpr,
    LONG: tl.constexpr,
    HAS_BASE: tl.constexpr,
    HAS_FACTOR: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One row of the sum by columns, where its segment is as long as this launch has them."""
    row = (tl.program_id(0) // num_tiles).to(tl.int64)
    if ARE_LONG:
        row = tl.load(long_ptr + row)
    first, last = tl.load(starts_ptr + row), tl.load(starts_ptr + row + 1)
    if (last - first > LONG) == ARE_LONG:
        offs_d = tl.program_id(0) % num_tiles * BLOCK_D + tl.arange(0, BLOCK_D)
        inside = offs_d < hidden_size
        terms = tokens_ptr, coefficients_ptr, first, last
        rows = hidden_ptr, hidden_stride, num_tokens
        total = sum_of_rows(*terms, *rows, offs_d, inside, BLOCK_E, BLOCK_D)
        if HAS_BASE:
            base = tl.load(base_ptr + row * base_stride + offs_d, mask=inside, other=0.0)
            if HAS_FACTOR:
                base *= tl.load(base_factor_ptr)
            total += base
        to = out_ptr + row * hidden_size + offs_d
        tl.store(to, total.to(out_ptr.dtype.element_ty), mask=inside)
