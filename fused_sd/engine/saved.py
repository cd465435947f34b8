"""What a chunked run leaves for backward: finished gradients, and sparse values.

Dimension key:  N tokens, D hidden size, V vocabulary, E sparse values of all tokens, F tokens whose
                gradient is dense
"""

from typing import NamedTuple

import torch
from torch import Tensor

from fused_sd.engine.workspace import Workspace

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


def unfilled(
    workspace: Workspace,
    wanted: Wanted,
    num_tokens: int | None = None,  # None: all that are run
    num_columns: int | None = None,  # None: V
) -> Dense:
    """Memory for the wanted gradients; that of a bias is 0, since its parts are added."""
    student, wide = workspace.student, workspace.logits
    num_tokens = student.hidden.shape[0] if num_tokens is None else num_tokens
    num_columns = student.vocab if num_columns is None else num_columns
    width = student.hidden.shape[1]
    shapes = [(num_tokens, width), (num_columns, width), (num_columns,)]
    given = zip(wanted, shapes, strict=True)
    tensors = [wide.new_empty(shape if is_wanted else 0) for is_wanted, shape in given]
    tensors[2].zero_()
    return Dense(*tensors)


def starts_of(counts: Tensor) -> Tensor:
    """(N + 1,) where the values of each token begin, and the end of the last."""
    return torch.cat([counts.new_zeros(1), counts.cumsum(0)])
