"""Sets of token ids: which of them count, and how far two sets agree.

Dimension key:  C rows in a chunk, K ids of a row
"""

import torch
from torch import Tensor


def first_occurrence(ids: Tensor) -> Tensor:
    """Whether each id (C, K) is not negative and does not stand further left in its row."""
    ordered, order = ids.sort(dim=-1, stable=True)
    is_first = torch.ones_like(ids, dtype=torch.bool)
    is_first[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    return torch.zeros_like(is_first).scatter_(1, order, is_first) & (ids >= 0)


def overlap(ids: Tensor, other: Tensor) -> Tensor:
    """Share of the distinct ids (C, K) that are among the others (C, K): (C,)."""
    ordered = other.sort(dim=-1).values
    at = torch.searchsorted(ordered, ids).clamp(max=ordered.shape[-1] - 1)
    return (ordered.gather(1, at) == ids).float().mean(-1)
