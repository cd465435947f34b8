"""What a row function sees of a chunk, and what it is.

Dimension key:  C tokens in a chunk, W columns of a chunk's logits, J values for each token,
                K entries of a row
"""

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from fused_sd.backend import Rows
from fused_sd.heads import Shaping


class Chunk(NamedTuple):
    """What a row function sees of a chunk."""

    student: Tensor  # (C, W) logits in fp32 or fp64, -inf behind the vocabulary; may be overwritten
    teacher: Tensor | None  # (C, W), as student
    columns: int  # that a comparison of both sides reads
    inputs: list[Tensor]  # per-token inputs, each (C, ...)
    upstream: Tensor | None  # (C, J) or (C, 1); None where no gradient is wanted
    dlogits: Tensor | None  # (C, W) for the gradient; may be the student's memory
    shaping: Shaping  # of the student's logits
    rows: Rows  # the row functions of the backend

    def sides(self) -> tuple[Tensor, Tensor]:
        """The logits (C, columns) of both sides, as a comparison reads them."""
        assert self.teacher is not None
        return self.student[:, : self.columns], self.teacher[:, : self.columns]

    def write_gradient_(
        self,
        background: Tensor | None,  # (C,) log-normaliser of the entries outside; None: they get 0
        constant: Tensor,  # (C,)
        slope: Tensor | None,  # (C,)
        columns: Tensor,  # (C, K)
        logits: Tensor,  # (C, K) at the columns
        values: Tensor,  # (C, K) gradient by the logits there
    ) -> None:
        """A softmax gradient over whole rows of logits, and entries' own values over it.

        The entries are set and not added, so that each is rounded once.
        """
        cap, dlogits = self.shaping.cap, self.dlogits
        assert dlogits is not None
        if background is None:
            dlogits.zero_()
        else:
            fill = self.rows.softmax_gradient_
            fill(self.student, background, constant, slope, cap, dlogits)
        if cap is not None:
            values = torch.where(values == 0, 0, values * (1 - (logits / cap).square()))
        dlogits.scatter_(1, columns, values.to(dlogits.dtype))


class RowFunction(Protocol):
    """What is done to a chunk of logits."""

    def __call__(self, chunk: Chunk) -> tuple[Tensor, list[Tensor]]:
        """Values (C, J) and extras (C, ...); where wanted, the gradient by the product is written.

        It is that of ``sum(upstream * values)``, and goes to the first V columns of
        ``chunk.dlogits``.
        """

    def extras(self) -> list[tuple[bool, tuple[int, ...]]]:
        """Of each extra: whether it holds token ids, and its shape behind the token axis."""

    @property
    def num_values(self) -> int:
        """J."""

    def replay(self, extras: list[Tensor]) -> tuple["RowFunction", list[Tensor]]:
        """The row function of a second walk, and inputs for it beside the first walk's.

        A choice that the first walk made must not be made anew.
        """
