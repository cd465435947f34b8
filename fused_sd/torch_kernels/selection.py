"""Which entries of a row are kept: the k largest logits, and the largest values of a gradient.

The twin of ``kernels/selection.py`` in PyTorch: same arguments, same results.  Of equal logits the
lowest ids are chosen and of equal magnitudes all or none, so that a choice has one answer.

Dimension key:  C rows of logits, R rows of a gradient, W and V their columns, M places in a row
"""

from typing import NamedTuple

import torch
from torch import Tensor

from fused_sd.torch_kernels.row_blocks import for_row_blocks, rows_in_block
from fused_sd.torch_kernels.slices import slices

BLOCK = 128  # columns that top_k compares by their maximum


class Selection(NamedTuple):
    """The largest entries of each row of a gradient, and what is dropped with the others.

    Sums are in fp32, of an fp64 gradient in fp64.
    """

    columns: Tensor  # (R, M) int32, ascending in a row; V in places that are not used
    values: Tensor  # (R, M) wide; 0 in places that are not used
    count: Tensor  # type: ignore[assignment]  # (R,) int64 entries kept; hides tuple.count
    norm: Tensor  # (R,) sum |g| of the whole row
    dropped: Tensor  # (R,) sum |g| over what is dropped
    dropped_mass: Tensor  # (R,) sum g over what is dropped


class _RowSums(NamedTuple):
    """Sums over rows of a gradient, (R,) each."""

    norm: Tensor  # sum |g| over the whole row
    rest: Tensor  # sum |g| over what is no candidate
    dropped_mass: Tensor  # sum g over what is no candidate


def has_short_list(k: int, num_columns: int) -> bool:
    """Whether the blocks that may hold the k largest are few beside the row."""
    return 4 * k * BLOCK < num_columns


def top_k(logits: Tensor, k: int) -> Tensor:
    """Ids of the k largest logits of each row, largest first, equal logits by lowest id.

    The k largest logits lie in the k blocks of columns with the largest maxima (of equal ones the
    leftmost), so a row is read once for its block maxima and only those blocks are searched.

    Args:
        logits: (C, W) fp32 or fp64, -inf behind the vocabulary.  NaN counts as the largest.
        k: at least 1, at most the vocabulary.

    Returns:
        ids: (C, k) int64.
    """
    num_columns = logits.shape[1]
    if not has_short_list(k, num_columns):
        return _by_size(logits, _largest(logits, k))
    blocks = _largest(_block_maxima(logits), k)
    columns = torch.arange(BLOCK, device=logits.device)
    candidates = (blocks[:, :, None] * BLOCK + columns).flatten(
        1
    )  # ascending, so that of equal logits the lowest comes first
    found = logits.gather(1, candidates.clamp(max=num_columns - 1))
    found.masked_fill_(candidates >= num_columns, -torch.inf)
    return candidates.gather(1, _by_size(found, _largest(found, k)))


def select(gradient: Tensor, share: float, most: int) -> Selection:
    """The fewest entries of each row whose complement has at most a share of the row's L1 norm.

    Candidates are the entries with ``|g| >= 2**e``, g != 0, for the smallest e that leaves at most
    ``most`` of them.  If what is below them is within the budget, the fewest largest candidates are
    kept for which what is dropped still is, and with the smallest kept entry all that equal it in
    magnitude.  Else all candidates are kept, and ``dropped > share * norm`` says so.  What is
    dropped is summed as such, never as the difference of two larger sums.

    Args:
        gradient: (R, V) bf16, fp16, fp32 or fp64; unit stride in the columns, any in the rows.
        share: of a row's norm that may be dropped, at least 0.
        most: entries that may be kept of a row, at least 0.

    Returns:
        Selection with M = min(most, V).  A row whose norm is not finite keeps nothing, and what it
        drops is NaN, which is within no budget.
    """
    num_rows, vocab = gradient.shape
    wide = torch.promote_types(gradient.dtype, torch.float32)
    looked_at = min(most + 1, vocab)  # one more than may be kept decides who is a candidate
    ids = torch.empty((num_rows, looked_at), dtype=torch.int64, device=gradient.device)
    values = torch.empty(ids.shape, dtype=wide, device=gradient.device)
    norm, rest, dropped_mass = (values.new_empty(num_rows) for _ in range(3))

    def choose(at: slice, signed: Tensor, magnitude: Tensor) -> None:
        torch.abs(signed.copy_(gradient[at]), out=magnitude)
        torch.sum(magnitude, -1, out=norm[at])
        ids[at] = top_k(magnitude, looked_at)
        torch.gather(signed, 1, ids[at], out=values[at])
        outside = torch.where(_is_candidate(values[at], most), 0, values[at])
        torch.sum(magnitude.scatter_(1, ids[at], outside.abs()), -1, out=rest[at])
        torch.sum(signed.scatter_(1, ids[at], outside), -1, out=dropped_mass[at])

    for_row_blocks(gradient, 2, choose)
    return _fewest(ids, values, _RowSums(norm, rest, dropped_mass), share, most, vocab)


def trim(selection: Selection, smallest: Tensor, is_dense: Tensor) -> Selection:
    """A selection without its values of small magnitude, and without all those of some rows.

    Args:
        selection: of R rows; is left as it is.
        smallest: () magnitude below which values are dropped too.
        is_dense: (R,) which rows keep no value and drop nothing.

    Returns:
        Selection with 0 in place of the values that are gone, and with their columns still there.
    """
    values = selection.values
    kept = torch.where((values.abs() < smallest) | is_dense[:, None], 0, values)
    gone = values - kept
    return selection._replace(
        values=kept,
        count=(kept != 0).sum(-1),
        dropped=torch.where(is_dense, 0, selection.dropped + gone.abs().sum(-1)),
        dropped_mass=torch.where(is_dense, 0, selection.dropped_mass + gone.sum(-1)),
    )


def compact(selection: Selection, num_values: int) -> tuple[Tensor, Tensor]:
    """Columns (E,) and values (E,) of a selection, row by row, without the places not used.

    Args:
        num_values: E, the sum of ``selection.count``.  With it, nothing is read from the device.
    """
    columns, values = selection.columns.flatten(), selection.values.flatten()
    places = torch.nonzero_static(values != 0, size=num_values)[:, 0]
    return columns[places], values[places]


def _fewest(
    ids: Tensor,  # (R, M or M + 1) largest first
    values: Tensor,  # as ids
    sums: _RowSums,
    share: float,
    most: int,
    vocab: int,
) -> Selection:
    """Keep as few candidates as the budget allows, in the order of their columns."""
    norm, rest, dropped_mass = sums
    is_finite = norm.isfinite()
    is_candidate = _is_candidate(values, most) & is_finite[:, None]
    magnitude = values.abs()
    candidates = torch.where(is_candidate, magnitude, 0)
    num_kept = _first_that_fits(candidates, rest, share * norm, is_candidate.sum(-1))
    smallest = magnitude.gather(1, (num_kept - 1).clamp(min=0)[:, None])
    is_kept = is_candidate & (magnitude >= smallest) & (num_kept > 0)[:, None]
    lost = torch.where(is_candidate & ~is_kept, values, 0)
    columns, order = torch.where(is_kept, ids, vocab).sort(-1)
    places = min(most, vocab)
    return Selection(
        columns=columns[:, :places].int(),
        values=torch.where(is_kept, values, 0).gather(1, order[:, :places]),
        count=is_kept.sum(-1),
        norm=norm,
        dropped=torch.where(is_finite, rest + lost.abs().sum(-1), torch.nan),
        dropped_mass=dropped_mass + lost.sum(-1),
    )


def _first_that_fits(sizes: Tensor, rest: Tensor, budget: Tensor, most: Tensor) -> Tensor:
    """The fewest leading sizes (R, M) to keep so that the others and the rest fit a budget: (R,).

    It bisects, because a running sum in floating point has no fixed order on a GPU.
    """
    low, high = torch.zeros_like(most), most
    rank = torch.arange(sizes.shape[1], device=sizes.device)
    for _ in range(sizes.shape[1].bit_length()):
        middle = (low + high) // 2
        dropped = rest + torch.where(rank >= middle[:, None], sizes, 0).sum(-1)
        fits = dropped <= budget
        low, high = (
            torch.where(fits, low, middle + 1).minimum(high),
            torch.where(fits, middle, high),
        )
    return high


def _is_candidate(values: Tensor, most: int) -> Tensor:
    """Which entries (R, M + 1), largest first, are above the power of two that leaves ``most``."""
    is_candidate = values != 0
    if values.shape[1] > most:
        exponent = values.frexp().exponent
        is_candidate &= (exponent > exponent[:, most:]) | (values[:, most:] == 0)
    return is_candidate


def _by_size(values: Tensor, columns: Tensor) -> Tensor:
    """Ascending columns (C, k) in the order of their values, largest first."""
    order = values.gather(1, columns).sort(dim=-1, descending=True, stable=True).indices
    return columns.gather(1, order)


def _largest(values: Tensor, k: int) -> Tensor:
    """Columns of the k largest of each row, ascending; of equal values the leftmost: (C, k)."""
    num_rows, width = values.shape
    if k == width:
        return torch.arange(width, device=values.device).repeat(num_rows, 1)
    found, columns = values.topk(k + 1, dim=-1)
    columns = columns[:, :k].sort(-1).values
    tied = (found[:, k - 1] == found[:, k]).nonzero()[:, 0]
    for at in slices(0, len(tied), rows_in_block(len(tied), width)):
        rows, border = values[tied[at]], found[tied[at], k, None]
        is_above, is_border = ~(rows <= border), rows == border
        num_equal = k - is_above.sum(-1, keepdim=True)
        is_chosen = is_above | (is_border & (is_border.cumsum(-1) <= num_equal))
        columns[tied[at]] = is_chosen.nonzero()[:, 1].view(-1, k)
    return columns


def _block_maxima(logits: Tensor) -> Tensor:
    """The largest logit of every ``BLOCK`` columns: (C, ceil(W / BLOCK))."""
    num_columns = logits.shape[1]
    whole = num_columns // BLOCK * BLOCK
    blocks = logits[:, :whole].unflatten(1, (whole // BLOCK, BLOCK)).amax(-1)
    if whole == num_columns:
        return blocks
    return torch.cat([blocks, logits[:, whole:].amax(-1, keepdim=True)], 1)
