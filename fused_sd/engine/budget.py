"""Which rows of dlogits may be sparse, and how much each may drop, for a tolerance of the whole.

Dimension key:  R rows
"""

import torch
from torch import Tensor

from fused_sd.torch_kernels.selection import Selection

OWN_SHARE = 0.25  # share of the tolerance that a row may use on its own, where rows are summed
ROUNDING = 1e-3  # share of a budget, far above the rounding of the sums compared with it
PARTS = 2**32  # whole parts of a budget, in which prices are counted


def needs_dense(selection: Selection, tolerance: float, reduced: bool) -> Tensor:
    """(R,) which rows cannot stay sparse, for a dropped norm within tolerance.

    A row may always drop its own share of the tolerance, whatever factor backward gives it.  Where
    rows are summed, only the sum counts: the tolerance that those rows leave unused goes to the
    other rows, in ascending order of what they drop.
    """
    norm, dropped = selection.norm, selection.dropped
    within = dropped <= row_share(tolerance, reduced) * norm  # not where the norm is not a number
    if not reduced:
        return ~within
    left = _budget(norm, tolerance) - torch.where(within, dropped, 0).sum()
    prices, order = dropped.masked_fill(within, 0).sort(stable=True)
    is_sparse = torch.empty_like(within)
    is_sparse[order] = torch.arange(len(order), device=order.device) < count_within_budget(
        prices, left
    )
    return ~(is_sparse | within)


def smallest_kept(selection: Selection, is_dense: Tensor, tolerance: float) -> Tensor:
    """() magnitude below which values of summed rows are dropped too, as far as the budget goes.

    Among them are whole rows of small norm.
    """
    values = selection.values
    left = _budget(selection.norm, tolerance) - selection.dropped.masked_fill(is_dense, 0).sum()
    # places that are not used take part, as infinite ones: to leave them out by a mask, the host
    # would have to wait for their number
    sizes = values.abs().masked_fill(is_dense[:, None] | (values == 0), torch.inf).flatten()
    sizes = torch.cat([sizes, sizes.new_full((1,), torch.inf)]).sort().values
    return sizes.gather(0, count_within_budget(sizes, left)[None])[0]


def _budget(norm: Tensor, tolerance: float) -> Tensor:
    return tolerance * (1 - ROUNDING) * norm.sum()


def count_within_budget(prices: Tensor, budget: Tensor) -> Tensor:
    """How many of the ascending prices, from the first on, are within the budget together.

    They are counted in whole parts of the budget, rounded up: a running sum of floats would depend
    on its order, which a GPU does not keep.
    """
    parts = (prices.double() * (PARTS / budget)).ceil().nan_to_num(2 * PARTS).clamp(max=2 * PARTS)
    count = (parts.long().cumsum(0) <= PARTS).sum()
    return torch.where(budget > 0, count, 0)


def row_share(tolerance: float, reduced: bool) -> float:
    """What a row may drop of its own norm."""
    return (OWN_SHARE if reduced else 1.0) * (1 - ROUNDING) * tolerance
