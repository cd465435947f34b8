"""From sparse values to gradients, and logits at chosen entries, in PyTorch.

``kernels/sparse.py`` is the twin for a GPU, with the same names, arguments and results.

dlogits with few values for each token need neither of the two GEMMs: dhidden gathers rows of the
head, and dweight sums hidden states, sorted by vocabulary entry.  Sums are in fp32 (fp64 for fp64),
in an order that depends on the shapes alone, and are rounded once.

Dimension key:  N tokens, C tokens in a chunk, D hidden size, V vocabulary, K entries of a token,
                E sparse values of all tokens
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from fused_sd.torch_kernels.selection import Selection, compact, select, top_k, trim
from fused_sd.torch_kernels.slices import slices

__all__ = [
    "ByColumn",
    "Selection",
    "SparseValues",
    "by_column",
    "compact",
    "entry_logits",
    "gather_sum",
    "segment_sum",
    "select",
    "top_k",
    "trim",
]

LONGEST = 4096  # values that are summed one after the other
GATHERED = 2**21  # elements of rows at a time: large beside a call, small beside the head
GPU_GATHERED = 2**24


class SparseValues(NamedTuple):
    """Sparse dlogits, w.r.t. the product of hidden states and head, in CSR form."""

    columns: Tensor  # (E,) int32 in [0, V]; V: an empty place, whose value is 0
    values: Tensor  # (E,) fp32 or fp64
    starts: Tensor  # (N + 1,) int64, where each token's values begin
    dropped_mass: Tensor | None  # (N,) as values: goes to the mean row of the head


class ByColumn(NamedTuple):
    """Sparse values in the order of their columns."""

    tokens: Tensor  # (E,) int64, of each entry as it stands in ``SparseValues``
    order: Tensor  # (E,) int64, values by column, of one column by token
    starts: Tensor  # (V + 1,) int64, where each column's values begin; the last: empty places


def by_column(sparse: SparseValues, vocab: int) -> ByColumn:
    """Sort sparse values by column: O(E log E + V), without reading a value on the host."""
    device = sparse.columns.device
    places = torch.arange(sparse.columns.shape[0], device=device)
    tokens = torch.searchsorted(sparse.starts, places, right=True) - 1
    tokens.clamp_(max=sparse.starts.shape[0] - 2)  # of empty places behind all values
    columns, order = sparse.columns.sort(stable=True)
    ids = torch.arange(vocab + 1, dtype=columns.dtype, device=device)
    return ByColumn(tokens, order, torch.searchsorted(columns, ids))


def entry_logits(hidden: Tensor, weight: Tensor, ids: Tensor) -> Tensor:
    """Products of hidden states with a few rows of the head each, O(C K D).

    Args:
        hidden: (C, D).
        weight: (V, D) in the dtype of hidden.
        ids: (C, K) int64 in [0, V).

    Returns:
        (C, K) fp32, of fp64 operands fp64.
    """
    num_tokens, num_ids = ids.shape
    wide = torch.promote_types(hidden.dtype, torch.float32)
    out = torch.empty(ids.shape, dtype=wide, device=hidden.device)
    rows = _rows_at_a_time(hidden)
    for some in slices(0, num_ids, rows):
        for at in slices(0, num_tokens, max(1, rows // min(num_ids, rows))):
            gathered = weight[ids[at, some]].to(wide)
            torch.bmm(gathered, hidden[at, :, None].to(wide), out=out[at, some, None])
    return out


def gather_sum(
    sparse: SparseValues,
    weight: Tensor,
    mean_row: Tensor | None,
    factor: Tensor,
    dtype: torch.dtype,
) -> Tensor:
    """dhidden, O(E D): one weighted sum of the head's rows for each token.

    Args:
        weight: (V, D).
        mean_row: (D,) mean of the head's rows, as values; needed with dropped mass.
        factor: (N,) as values, of each token's sparse values and dropped mass.
        dtype: of the result.

    Returns:
        (N, D): ``factor * (sum of value * weight[column] + dropped_mass * mean_row)``.
    """
    is_entry = sparse.columns < weight.shape[0]
    before = torch.nn.functional.pad(is_entry.cumsum(0), (1, 0))
    starts = before[sparse.starts]
    columns, values = sparse.columns[is_entry].long(), sparse.values[is_entry]
    out = torch.empty((factor.shape[0], weight.shape[1]), dtype=dtype, device=weight.device)
    for at, total in _sums(weight, columns, values, starts):
        if sparse.dropped_mass is not None:
            assert mean_row is not None
            total.addcmul_(sparse.dropped_mass[at, None], mean_row)
        out[at] = total.mul_(factor[at, None])
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
    """dweight, O(E D + V D): one weighted sum of hidden states for each of the head's rows.

    Args:
        hidden: (N, D); rows of tokens without values are not read.
        vocab: V, rows of the head.
        factor: (N,) as values, of each token's values.
        base: (V, D) as values, a gradient to add to; None: 0.
        base_factor: () as values, of the base; None: 1.
        dtype: of the result.

    Returns:
        (V, D): ``base_factor * base + sum of factor * value * hidden`` over the
        values of the row's column.
    """
    by = by_column(sparse, vocab)
    tokens = by.tokens[by.order]
    values = sparse.values[by.order] * factor[tokens]
    out = torch.empty((vocab, hidden.shape[1]), dtype=dtype, device=hidden.device)
    for at, total in _sums(hidden, tokens, values, by.starts):
        if base is not None:
            total.add_(base[at] if base_factor is None else base[at] * base_factor)
        out[at] = total
    return out


def _sums(
    table: Tensor, ids: Tensor, values: Tensor, starts: Tensor
) -> Iterator[tuple[slice, Tensor]]:
    """Slices of bags with their sums of ``value * table[id]`` (bags, D) in the values' dtype.

    Only a wide and contiguous table is read in place: another would be copied whole.  Long bags are
    summed in parts, which is more accurate too.
    """
    is_ready = table.dtype == values.dtype and table.is_contiguous()
    num_bags, num_entries = starts.shape[0] - 1, ids.shape[0]
    rows = _rows_at_a_time(table)
    count = torch.arange(rows, device=table.device)

    def part(at: slice, bounds: Tensor) -> Tensor:
        return embedding_bag(
            ids[at] if is_ready else count[: at.stop - at.start],
            table if is_ready else table[ids[at]].to(values.dtype),
            (bounds - at.start).clamp(0, at.stop - at.start),
            mode="sum",
            per_sample_weights=values[at],
            include_last_offset=True,
        )

    for bags in slices(0, num_bags, max(1, rows * num_bags // max(num_bags, num_entries, 1))):
        bounds = starts[bags.start : bags.stop + 1]
        first, last = int(bounds[0]), int(bounds[-1])
        total = part(slice(first, min(first + rows, last)), bounds)
        for at in slices(first + rows, last, rows):
            total += part(at, bounds)
        yield bags, total


def _rows_at_a_time(table: Tensor) -> int:
    gathered = GPU_GATHERED if table.is_cuda else GATHERED
    return min(LONGEST, max(1, gathered // table.shape[1]))
