"""Sets of token ids, by hand."""

import torch

from fused_sd.terms.ids import first_occurrence, overlap


def test_an_id_counts_once_and_padding_does_not():
    ids = torch.tensor([[7, 2, 7, -1, 2, 0], [-1, -1, 5, 5, 5, 4]])
    assert first_occurrence(ids).tolist() == [
        [True, True, False, False, False, True],
        [False, False, True, False, False, True],
    ]


def test_an_overlap_is_the_share_of_common_ids_in_any_order():
    ids = torch.tensor([[9, 1, 4, 6], [9, 1, 4, 6], [1, 2, 3, 4]])
    other = torch.tensor([[6, 4, 9, 1], [5, 6, 7, 8], [9, 8, 7, 6]])
    assert overlap(ids, other).tolist() == [1.0, 0.25, 0.0]
