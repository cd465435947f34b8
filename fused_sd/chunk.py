"""What a row function sees of a chunk, and what it is.

Dimension key:  C tokens in a chunk, W columns of a chunk's logits, J values for each token,
                K entries of a row
"""

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from fused_sd.backend import Rows
from fused_sd.chunking import gradient_view
from fused_sd.heads import Shaping


class Chunk(NamedTuple):
    """What a row function sees of a chunk."""

    student: Tensor  # (C, W) logits in fp32 or fp64, -inf behind the vocabulary; may be overwritten
    teacher: Tensor | None  # (C, W), as student
    inputs: list[Tensor]  # per-token inputs, each (C, ...)
    upstream: Tensor | None  # (C, J) or (C, 1); None where no gradient is wanted
    shaping: Shaping  # of the student's logits
    gradient_dtype: torch.dtype
    rows: Rows  # the row functions of the backend

    def write_gradient_(
        self,
        background: Tensor | None,  # (C,) log-normaliser of the entries outside; None: they get 0
        constant: Tensor,  # (C,)
        slope: Tensor | None,  # (C,)
        columns: Tensor,  # (C, K)
        logits: Tensor,  # (C, K) at the columns
        values: Tensor,  # (C, K) gradient by the logits there
    ) -> Tensor:
        """A softmax gradient over whole rows of logits, and entries' own values over it: (C, W).

        The entries are set and not added, so that each is rounded once.
        """
        cap, dtype = self.shaping.cap, self.gradient_dtype
        if background is None:
            dlogits = gradient_view(self.student, dtype).zero_()
        else:
            fill = self.rows.softmax_gradient_
            dlogits = fill(self.student, background, constant, slope, cap, dtype)
        if cap is not None:
            values = torch.where(values == 0, 0, values * (1 - (logits / cap).square()))
        return dlogits.scatter_(1, columns, values.to(dtype))


class RowFunction(Protocol):
    """What is done to a chunk of logits."""

    def __call__(self, chunk: Chunk) -> tuple[Tensor, list[Tensor], Tensor | None]:
        """Values (C, J), extras (C, ...), and the gradient by the product (C, W) where wanted."""

    def extras(self) -> list[tuple[bool, tuple[int, ...]]]:
        """Of each extra: whether it holds token ids, and its shape behind the token axis."""

    @property
    def num_values(self) -> int:
        """J."""

    def replay(self, extras: list[Tensor]) -> tuple["RowFunction", list[Tensor]]:
        """The row function of a second walk, and inputs for it beside the first walk's.

        A choice that the first walk made must not be made anew.
        """
