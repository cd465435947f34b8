"""Which rows may be sparse, by hand: a tolerance of the whole is divided between the rows."""

import pytest
import torch

from fused_sd.engine.budget import (
    OWN_SHARE,
    ROUNDING,
    count_within_budget,
    needs_dense,
    row_share,
    smallest_kept,
)
from fused_sd.torch_kernels.selection import Selection


def selection(values, norm, dropped):
    values = torch.tensor(values, dtype=torch.float64)
    columns = torch.zeros(values.shape, dtype=torch.int32)
    norm, dropped = (torch.tensor(numbers, dtype=torch.float64) for numbers in (norm, dropped))
    return Selection(columns, values, (values != 0).sum(-1), norm, dropped, dropped)


def test_a_row_may_drop_its_share_of_its_own_norm():
    assert row_share(0.5, reduced=False) == pytest.approx(0.5 * (1 - ROUNDING))
    assert row_share(0.5, reduced=True) == pytest.approx(0.5 * OWN_SHARE * (1 - ROUNDING))


def test_rows_that_are_not_summed_stand_for_themselves():
    rows = selection([[1.0]] * 4, [10.0, 10.0, 0.0, float("nan")], [0.9, 1.1, 0.0, 0.1])
    assert needs_dense(rows, 0.1, reduced=False).tolist() == [False, True, False, True]


def test_what_summed_rows_leave_unused_goes_to_the_others_in_ascending_order():
    """A tolerance of 0.1 of 40 is 4: rows 1 and 3 use 0.2, and 3.796 are left for 3.5, not 4."""
    rows = selection([[1.0]] * 4, [10.0] * 4, [4.0, 0.1, 3.5, 0.1])
    assert needs_dense(rows, 0.1, reduced=True).tolist() == [True, False, False, False]
    # and for both where they fit together
    rows = selection([[1.0]] * 4, [10.0] * 4, [2.0, 0.1, 1.5, 0.1])
    assert not needs_dense(rows, 0.1, reduced=True).any()


def test_values_are_dropped_as_far_as_the_budget_goes():
    """Of 0.1 x 20 = 2 the rows drop 0.5; 0.25 + 0.5 + 0.625 of the values go, 1 does not."""
    rows = selection([[-0.25, 1.0, 0.0], [0.5, 0.625, 9.0]], [10.0, 10.0], [0.25, 0.25])
    sparse = torch.tensor([False, False])
    assert smallest_kept(rows, sparse, 0.1) == 1.0
    # neither what a dense row drops nor its values count: 1.748 are left, of which 0.25 + 1 go
    dense = torch.tensor([False, True])
    assert smallest_kept(rows, dense, 0.1) == torch.inf


@pytest.mark.parametrize(
    "prices, budget, count",
    [
        ([1.0, 1.0, 2.0], 4.0, 3),  # a power of two is divided without rounding
        ([1.0, 2.0, 3.0], 2.9, 1),
        ([1.0, 2.0, 3.0], 3.1, 2),
        ([0.0, 0.0, 1.0], 0.5, 2),
        ([0.0, 0.0, 1.0], 0.0, 0),
        ([0.0, 1.0], -1.0, 0),
        ([1.0, float("inf")], 9.0, 1),
        ([], 1.0, 0),
    ],
)
def test_prices_fit_a_budget_together(prices, budget, count):
    found = count_within_budget(torch.tensor(prices), torch.tensor(budget))
    assert found == count
