"""What a walk leaves for backward: finished gradients, and entries.

Dimension key:  N tokens, D hidden size, V vocabulary, E entries of all, F tokens whose gradient is
                dense
"""

from typing import NamedTuple

import torch
from torch import Tensor

from fused_sd.engine.workspace import Workspace

Formed = tuple[bool, bool, bool]  # gradients by hidden states, weight, bias


class Dense(NamedTuple):
    """Gradients formed by GEMMs, in fp32 or fp64; (0,) where they are not formed."""

    dhidden: Tensor  # (N, D); of a certified gradient (F, D)
    dweight: Tensor  # (V, D); of a certified gradient without dense rows (0, D)
    dbias: Tensor  # (V,)


class Sparse(NamedTuple):
    """A gradient by the product in entries, and what it leaves out; (0,) where there is none."""

    columns: Tensor  # (E,) int32; V: a place that is not used
    values: Tensor  # (E,)
    starts: Tensor  # (N + 1,) int64
    dropped_mass: Tensor  # (N,) mass that goes to the mean row of the head
    mean_row: Tensor  # (D,)
    dense_tokens: Tensor  # (F,) int64, ascending
    kept: Tensor  # (N,) int64
    norm: Tensor  # (N,)
    dropped: Tensor  # (N,)

    @classmethod
    def none(cls, like: Tensor) -> "Sparse":
        """No sparse gradient, in the dtype of ``like``."""
        dtypes = {"columns": torch.int32, "starts": torch.int64, "dense_tokens": torch.int64}
        dtypes["kept"] = torch.int64
        return cls(*(like.new_empty(0, dtype=dtypes.get(name)) for name in cls._fields))


def unfilled(
    workspace: Workspace,
    formed: Formed,
    num_tokens: int | None = None,  # None: all that are walked
    num_columns: int | None = None,  # None: V
) -> Dense:
    """Memory for the gradients that are formed; a bias's is added to."""
    student, wide = workspace.student, workspace.logits
    num_tokens = student.hidden.shape[0] if num_tokens is None else num_tokens
    num_columns = student.vocab if num_columns is None else num_columns
    width = student.hidden.shape[1]
    shapes = [(num_tokens, width), (num_columns, width), (num_columns,)]
    given = zip(formed, shapes, strict=True)
    tensors = [wide.new_empty(shape if is_formed else 0) for is_formed, shape in given]
    tensors[2].zero_()
    return Dense(*tensors)


def starts_of(counts: Tensor) -> Tensor:
    """(N + 1,) where the entries of each token begin."""
    return torch.cat([counts.new_zeros(1), counts.cumsum(0)])
