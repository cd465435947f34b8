"""What a chunked run leaves for backward: finished gradients, and sparse values.

Dimension key:  N tokens, D hidden size, V vocabulary, E sparse values of all tokens, F tokens whose
                gradient is dense
"""

from typing import NamedTuple

import torch
from torch import Tensor

Wanted = tuple[bool, bool, bool]  # which gradients: w.r.t. hidden states, weight, bias


class Dense(NamedTuple):
    """Gradients that GEMMs made, in fp32 or fp64; (0,) where they are not wanted."""

    dhidden: Tensor  # (N, D); of a certified gradient (F, D)
    dweight: Tensor  # (V, D); of a certified gradient without dense rows (0, D)
    dbias: Tensor  # (V,)


class Sparse(NamedTuple):
    """The logits' gradient as sparse values, and what it leaves out; (0,) where there is none."""

    columns: Tensor  # (E,) int32; V marks a place that is not used
    values: Tensor  # (E,)
    starts: Tensor  # (N + 1,) int64, where each token's values begin
    dropped_mass: Tensor  # (N,) signed sum of what is left out, which goes to the head's mean row
    mean_row: Tensor  # (D,) mean of the head's rows
    dense_tokens: Tensor  # (F,) int64, ascending
    kept: Tensor  # (N,) int64, number of values of each token
    norm: Tensor  # (N,) L1 norm of each token's gradient
    dropped: Tensor  # (N,) L1 norm of what is left out

    @classmethod
    def none(cls, like: Tensor) -> "Sparse":
        """No sparse gradient, in the dtype of ``like``."""
        dtypes = {"columns": torch.int32, "starts": torch.int64, "dense_tokens": torch.int64}
        dtypes["kept"] = torch.int64
        return cls(*(like.new_empty(0, dtype=dtypes.get(name)) for name in cls._fields))


def starts_of(counts: Tensor) -> Tensor:
    """(N + 1,) where the values of each token begin, and the end of the last."""
    return torch.cat([counts.new_zeros(1), counts.cumsum(0)])
