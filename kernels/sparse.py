"""Logits and gradients of few entries in Triton: the twin of ``fused_sd/torch_kernels/sparse.py``.

Both modules have the same functions with the same arguments and results; the twin's docstrings
describe the arguments.  Nothing here is a GEMM: rows of the head, or hidden states, are gathered
from memory and summed in registers, and every element of a result is written by one program.

Dimension key:  N tokens, C tokens in a chunk, D hidden size, V vocabulary, K entries of a token,
                E sparse values of all tokens
"""

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from fused_sd.kernels.programs import sparse as programs
from fused_sd.kernels.selection import compact, select, top_k, trim
from fused_sd.kernels.tuning import launch
from fused_sd.torch_kernels.sparse import SparseValues, by_column

__all__ = ["compact", "entry_logits", "gather_sum", "segment_sum", "select", "top_k", "trim"]

LONG = 512  # values of a column above which it is summed in tiles of another shape


class TileShape(NamedTuple):
    """The tile of rows that a program gathers at a time, and the program's warps."""

    num_rows: int
    num_bytes: int  # of each row
    num_warps: int


FEW = TileShape(4, 4096, 4)  # for the few values of a token, or of most columns
MANY = TileShape(128, 256, 8)  # for the many values of a column that every token names
DOTS = TileShape(16, 512, 8)  # for dot products; with half the warps some compilers spill


def entry_logits(hidden: Tensor, weight: Tensor, ids: Tensor) -> Tensor:
    """Dot products of hidden states with a few rows of the head each: (C, K) fp32.

    A product's bits depend on its two rows alone, not on its place among the others.
    """
    hidden, weight = _rows(hidden), _rows(weight)
    num_tokens, num_entries = ids.shape
    out = torch.empty(ids.shape, dtype=torch.float32, device=hidden.device)
    tile = _tile(DOTS, hidden)
    num_tiles = triton.cdiv(num_entries, tile["BLOCK_E"])
    launch(
        programs.entry_logits,
        num_tokens * num_tiles,
        hidden,
        hidden_ptr=hidden,
        hidden_stride=hidden.stride(0),
        weight_ptr=weight,
        weight_stride=weight.stride(0),
        ids_ptr=ids.contiguous(),
        out_ptr=out,
        num_entries=num_entries,
        num_tiles=num_tiles,
        hidden_size=hidden.shape[1],
        **tile,
    )
    return out


def gather_sum(
    sparse: SparseValues,
    weight: Tensor,
    mean_row: Tensor | None,
    factor: Tensor,
    dtype: torch.dtype,
) -> Tensor:
    """Gradient w.r.t. the hidden states (N, D): weighted sums of the head's rows."""
    weight, factor, dropped_mass = _rows(weight), factor.contiguous(), sparse.dropped_mass
    num_tokens, (vocab, hidden_size) = factor.shape[0], weight.shape
    out = torch.empty((num_tokens, hidden_size), dtype=dtype, device=weight.device)
    tile = _tile(FEW, weight)
    num_tiles = triton.cdiv(hidden_size, tile["BLOCK_D"])
    launch(
        programs.gather_sum,
        num_tokens * num_tiles,
        sparse.columns,
        columns_ptr=sparse.columns,
        values_ptr=sparse.values,
        starts_ptr=sparse.starts,
        dropped_mass_ptr=None if dropped_mass is None else dropped_mass.contiguous(),
        factor_ptr=factor,
        weight_ptr=weight,
        weight_stride=weight.stride(0),
        vocab=vocab,
        mean_ptr=mean_row,
        out_ptr=out,
        hidden_size=hidden_size,
        num_tiles=num_tiles,
        **tile,
    )
    return out


def segment_sum(
    sparse: SparseValues,
    hidden: Tensor,
    vocab: int,
    factor: Tensor,
    base: Tensor | None,
    base_factor: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """Gradient w.r.t. the head (V, D): one weighted sum of hidden states for each of its rows.

    A column of few values is summed in wide tiles of few rows, a long one in narrow tiles of many
    rows, by more programs.  The second launch covers as many columns as can be long, so that the
    host need not wait for their number.
    """
    hidden = _rows(hidden)
    hidden_size = hidden.shape[1]
    by = by_column(sparse, vocab)
    tokens = by.tokens[by.order]
    coefficients = sparse.values[by.order] * factor[tokens]
    num_long = min(vocab, tokens.shape[0] // (LONG + 1))
    longest = (by.starts[1:] - by.starts[:-1]).topk(num_long).indices
    out = torch.empty((vocab, hidden_size), dtype=dtype, device=hidden.device)
    for num_rows, long_columns, shape in ((vocab, None, FEW), (num_long, longest, MANY)):
        tile = _tile(shape, hidden)
        num_tiles = triton.cdiv(hidden_size, tile["BLOCK_D"])
        launch(
            programs.segment_sum,
            num_rows * num_tiles,
            tokens,
            tokens_ptr=tokens,
            coefficients_ptr=coefficients,
            starts_ptr=by.starts,
            long_ptr=long_columns,
            hidden_ptr=hidden,
            hidden_stride=hidden.stride(0),
            num_tokens=hidden.shape[0],
            base_ptr=base,
            base_stride=None if base is None else base.stride(0),
            base_factor_ptr=base_factor,
            out_ptr=out,
            hidden_size=hidden_size,
            num_tiles=num_tiles,
            LONG=LONG,
            **tile,
        )
    return out


def _tile(shape: TileShape, rows: Tensor) -> dict[str, Any]:
    """Constants of a program that gathers rows of a matrix in tiles of a shape."""
    width = min(shape.num_bytes // rows.element_size(), triton.next_power_of_2(rows.shape[1]))
    return {"BLOCK_E": shape.num_rows, "BLOCK_D": width, "num_warps": shape.num_warps}


def _rows(matrix: Tensor) -> Tensor:
    """The matrix with unit stride in its rows; rows may be any distance apart."""
    return matrix if matrix.stride(1) == 1 else matrix.contiguous()
