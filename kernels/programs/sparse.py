"""Triton programs for gradients and logits of few entries: dot products and sums of gathered rows.

Sums are in fp32 and are rounded once, when they are stored.  The order of a sum depends on the
number of its terms alone, so a result is the same to the bit in every run.

Dimension key:  N tokens, C tokens in a chunk, D hidden size, V vocabulary, K entries of a token,
                E entries of all tokens, L long columns
"""

import triton
import triton.language as tl


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
    """Sum of ``coefficient * rows[index]`` over the terms from ``first`` to ``last``: (BLOCK_D,).

    Only the elements ``offs_d`` of a row are summed, those that are ``inside``.  A term whose index
    is ``num_rows`` or above is an empty place and adds nothing.
    """
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
def entry_logits(
    hidden_ptr,  # (C, D) bf16, fp16 or fp32, unit stride in a row
    hidden_stride,  # elements from one hidden state to the next
    weight_ptr,  # (V, D) in the dtype of hidden, unit stride in a row: the head
    weight_stride,  # elements from one row of the head to the next
    ids_ptr,  # (C, K) int64, contiguous, in [0, V): rows of the head
    out_ptr,  # (C, K) fp32, contiguous, written: dot products
    num_entries,  # K
    num_tiles,  # programs for each token
    hidden_size,  # D
    BLOCK_E: tl.constexpr,  # entries of a program
    BLOCK_D: tl.constexpr,  # elements of a row that are multiplied at a time
):
    """Dot products of a token's hidden state with chosen rows of the head.

    One program for BLOCK_E entries of a token.  ``entry_logits`` in ``kernels/sparse.py`` launches
    it for supports of a few entries, so that a side needs no whole logits.  A product's bits depend
    on its two rows and not on its place among the others, so that a teacher that equals the student
    has the same logits.
    """
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
def gather_sum(
    columns_ptr,  # (E,) int32 in [0, V]: the entries' columns, token by token; V: an empty place
    values_ptr,  # (E,) fp32: the entries
    starts_ptr,  # (N + 1,) int64: where each token's entries start
    dropped_mass_ptr,  # (N,) fp32 or None: factor of the mean row
    factor_ptr,  # (N,) fp32: factor of each token's gradient
    weight_ptr,  # (V, D) bf16, fp16 or fp32, unit stride in a row: the head
    weight_stride,  # elements from one row of the head to the next
    vocab,  # V
    mean_ptr,  # (D,) fp32, mean row of the head; not read without dropped mass
    out_ptr,  # (N, D) any float dtype, contiguous, written: gradient w.r.t. the hidden states
    hidden_size,  # D
    num_tiles,  # programs for each token
    BLOCK_E: tl.constexpr,  # rows that are gathered at a time
    BLOCK_D: tl.constexpr,  # elements of the result of a program
):
    """A token's gradient w.r.t. its hidden state: a weighted sum of a few rows of the head.

    One program for BLOCK_D elements of a token's gradient, so that every element has one writer and
    needs no atomic addition.  ``gather_sum`` in ``kernels/sparse.py`` launches it.
    """
    token = (tl.program_id(0) // num_tiles).to(tl.int64)
    offs_d = tl.program_id(0) % num_tiles * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = offs_d < hidden_size
    total = sum_of_rows(
        index_ptr=columns_ptr,
        coefficient_ptr=values_ptr,
        first=tl.load(starts_ptr + token),
        last=tl.load(starts_ptr + token + 1),
        rows_ptr=weight_ptr,
        stride=weight_stride,
        num_rows=vocab,
        offs_d=offs_d,
        inside=inside,
        BLOCK_E=BLOCK_E,
        BLOCK_D=BLOCK_D,
    )
    if dropped_mass_ptr is not None:
        mean = tl.load(mean_ptr + offs_d, mask=inside, other=0.0)
        total += tl.load(dropped_mass_ptr + token) * mean
    total *= tl.load(factor_ptr + token)
    to = out_ptr + token * hidden_size + offs_d
    tl.store(to, total.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def segment_sum(
    tokens_ptr,  # (E,) int64 in [0, N): the entries' tokens, column by column
    coefficients_ptr,  # (E,) fp32: the entries times their tokens' factors, in the same order
    starts_ptr,  # (V + 1,) int64: where each column's entries start
    long_ptr,  # (L,) int64, columns that may have more than LONG entries; None: all the others
    hidden_ptr,  # (N, D) bf16, fp16 or fp32, unit stride in a row
    hidden_stride,  # elements from one hidden state to the next
    num_tokens,  # N
    base_ptr,  # (V, D) fp32 or None, unit stride in a row: added to the result
    base_stride,  # elements from one row of the base to the next
    base_factor_ptr,  # () fp32 or None: factor of the base
    out_ptr,  # (V, D) any float dtype, contiguous, written: gradient w.r.t. the head
    hidden_size,  # D
    num_tiles,  # programs for each column
    LONG: tl.constexpr,  # entries of a column above which it is long
    BLOCK_E: tl.constexpr,  # hidden states that are gathered at a time
    BLOCK_D: tl.constexpr,  # elements of the result of a program
):
    """A column's row of the gradient w.r.t. the head: a weighted sum of hidden states.

    One program for BLOCK_D elements of a column's row.  ``segment_sum`` in ``kernels/sparse.py``
    launches it twice, over all columns and over those that may be long, with tiles of other shapes;
    a program whose column is of the other launch's kind does nothing.
    """
    row = (tl.program_id(0) // num_tiles).to(tl.int64)
    if long_ptr is not None:
        row = tl.load(long_ptr + row)
    first, last = tl.load(starts_ptr + row), tl.load(starts_ptr + row + 1)
    if (last - first > LONG) == (long_ptr is not None):
        offs_d = tl.program_id(0) % num_tiles * BLOCK_D + tl.arange(0, BLOCK_D)
        inside = offs_d < hidden_size
        total = sum_of_rows(
            index_ptr=tokens_ptr,
            coefficient_ptr=coefficients_ptr,
            first=first,
            last=last,
            rows_ptr=hidden_ptr,
            stride=hidden_stride,
            num_rows=num_tokens,
            offs_d=offs_d,
            inside=inside,
            BLOCK_E=BLOCK_E,
            BLOCK_D=BLOCK_D,
        )
        if base_ptr is not None:
            base = tl.load(base_ptr + row * base_stride + offs_d, mask=inside, other=0.0)
            if base_factor_ptr is not None:
                base *= tl.load(base_factor_ptr)
            total += base
        to = out_ptr + row * hidden_size + offs_d
        tl.store(to, total.to(out_ptr.dtype.element_ty), mask=inside)
