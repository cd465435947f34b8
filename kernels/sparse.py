"""Work on chosen entries in Triton: the twin of ``fused_sd/torch_kernels/sparse.py``.

Dimension key:  N tokens, C tokens in a chunk, D hidden size, V vocabulary, K entries of a token,
                E entries of all tokens
"""

from typing import Any

import torch
import triton
from torch import Tensor

from fused_sd.kernels.launching import launch
from fused_sd.kernels.programs import sparse as programs
from fused_sd.kernels.selection import select, top_k
from fused_sd.torch_kernels.sparse import SparseValues, by_column

__all__ = ["entry_logits", "gather_sum", "segment_sum", "select", "top_k"]

LONG = 512  # entries of a column that a program of its own sums
# rows times bytes of each that a program gathers at a time, and its warps: of the few entries of
# most columns, of the many of a column that every token names, and of dot products
FEW, MANY, DOTS = (4, 4096, 4), (128, 256, 8), (16, 512, 4)


def entry_logits(hidden: Tensor, weight: Tensor, ids: Tensor) -> Tensor:
    """Products of hidden states with a few rows of the head each: (C, K) fp32; see the twin.

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
        *(hidden, hidden.stride(0), weight, weight.stride(0), ids.contiguous(), out),
        *(num_entries, num_tiles, hidden.shape[1]),
        **tile,
    )
    return out


def gather_sum(
    entries: SparseValues,
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
    launch(
        programs.gather_sum,
        num_tokens * num_tiles,
        *(entries.columns, entries.values, entries.starts),
        *(factor if entries.dropped_mass is None else entries.dropped_mass.contiguous(), factor),
        *(weight, weight.stride(0), vocab, factor if mean_row is None else mean_row),
        *(out, hidden_size, num_tiles),
        HAS_DROPPED_MASS=entries.dropped_mass is not None,
        **tile,
    )
    return out


def segment_sum(
    entries: SparseValues,
    hidden: Tensor,
    vocab: int,
    factor: Tensor,
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
        launch(
            programs.segment_sum,
            num_rows * num_tiles,
            *(tokens, coefficients, by.starts, longest, hidden, hidden.stride(0)),
            hidden.shape[0],
            *(out if base is None else base, out.stride(0) if base is None else base.stride(0)),
            *(out if base_factor is None else base_factor, out, hidden_size, num_tiles),
            ARE_LONG=shape is MANY,
            LONG=LONG,
            HAS_BASE=base is not None,
            HAS_FACTOR=base_factor is not None,
            **tile,
        )
    return out


def _tile(shape: tuple[int, int, int], rows: Tensor) -> dict[str, Any]:
    """Constants of a program that gathers rows in tiles."""
    num_rows, num_bytes, num_warps = shape
    width = min(num_bytes // rows.element_size(), triton.next_power_of_2(rows.shape[1]))
    return {"BLOCK_E": num_rows, "BLOCK_D": width, "num_warps": num_warps}


def _rows(matrix: Tensor) -> Tensor:
    """A matrix whose rows lie in memory as such, wherever they start."""
    return matrix if matrix.stride(1) == 1 else matrix.contiguous()
