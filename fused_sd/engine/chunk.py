"""What a row function sees of a chunk, and what it is.

Dimension key:  C tokens in a chunk, W columns of a chunk's logits, V vocabulary, J values for each
                token, K entries of a row
"""

from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from fused_sd.engine.backend import Functions
from fused_sd.head.projection import Shaping
from fused_sd.head.vocab_shard import VocabShard


class Side(NamedTuple):
    """One side's logits of a chunk, in fp32 or fp64, over this rank's columns."""

    whole: Tensor | None  # (C, W), -inf behind the vocabulary; may be overwritten; None: not made
    dot_products: Callable[[Tensor], Tensor]  # of (C, K) columns, where the whole is not made


class SparseBuffers(NamedTuple):
    """Where a chunk's sparse gradient goes."""

    columns: Tensor  # (C, K) int32
    values: Tensor  # (C, K)
    vocab: int  # the column of a place that is not used


class Chunk(NamedTuple):
    """What a row function sees of a chunk."""

    student_side: Side
    teacher_side: Side | None
    dlogits: Tensor | None  # (C, W) for the gradient; may be the student's memory
    entries: SparseBuffers | None  # for the gradient of a row function that only has entries
    columns: int  # that a comparison of both sides reads
    width: int  # W
    inputs: list[Tensor]  # per-token inputs, each (C, ...)
    row_weights: Tensor | None  # (C, J) or (C, 1); None where no gradient is wanted
    shaping: Shaping  # of the student's logits
    functions: Functions  # of the backend
    shard: VocabShard  # whose columns these are

    @property
    def student(self) -> Tensor:
        """The student's whole logits (C, W), for row functions that have them made."""
        assert self.student_side.whole is not None
        return self.student_side.whole

    @property
    def teacher(self) -> Tensor | None:
        """The teacher's whole logits (C, W), where they are made."""
        return None if self.teacher_side is None else self.teacher_side.whole

    def part(self, side: Side, ids: Tensor, *, dotted: bool = False) -> Tensor:
        """This rank's part of a side's logits (C, K) at ids: 0 where they are another rank's.

        Args:
            dotted: by dot products, even where the whole logits are made.
        """
        columns, is_own = self.shard.local(ids)
        if dotted or side.whole is None:
            found = side.dot_products(columns)
        else:
            found = side.whole.gather(1, columns)
        return found if is_own is None else torch.where(is_own, found, 0)

    def columns_of(self, ids: Tensor) -> Tensor:
        """Columns of ids; those of other ranks point to the last column, which is padding."""
        return self.shard.columns(ids, self.width - 1)

    def top_k(self, side: Side | None, k: int) -> Tensor:
        """Ids (C, k) of a side's largest logits."""
        assert side is not None
        assert side.whole is not None
        return self.shard.top_k(self.functions.sparse.top_k, side.whole, k)

    def log_normalizer(self, side: Side) -> Tensor:
        """Log-sum-exp (C,) of a side's logits, of all ranks."""
        lse = self.functions.rows.log_normalizer(side.whole)
        return self.shard.join([lse]).normalizers[0]

    def sides(self) -> tuple[Tensor, Tensor]:
        """The logits (C, columns) of both sides, as a comparison reads them."""
        assert self.teacher is not None
        return self.student[:, : self.columns], self.teacher[:, : self.columns]

    def write_gradient_(
        self,
        background: Tensor | None,  # (C,) log-normaliser of the entries outside; None: they get 0
        constant: Tensor,  # (C,)
        slope: Tensor | None,  # (C,)
        columns: Tensor,  # (C, K) of this rank; V and above: nowhere
        logits: Tensor,  # (C, K) at the columns
        values: Tensor,  # (C, K) gradient by the logits there
    ) -> None:
        """A softmax gradient over whole rows of logits, and entries' own values over it.

        The entries are set and not added, so that each is rounded once.
        """
        cap, dlogits = self.shaping.cap, self.dlogits
        if cap is not None:
            values = torch.where(values == 0, 0, values * (1 - (logits / cap).square()))
        if self.entries is not None:
            vocab = self.entries.vocab
            self.entries.columns.copy_(columns.clamp(max=vocab))
            self.entries.values.copy_(values.masked_fill(columns >= vocab, 0))
            return
        assert dlogits is not None
        if background is None:
            dlogits.zero_()
        else:
            fill = self.functions.rows.softmax_gradient_
            fill(self.student, background, constant, slope, cap, dlogits)
        dlogits.scatter_(1, columns, values.to(dlogits.dtype))


class Objective(Protocol):
    """What is done to a chunk of logits."""

    def __call__(self, chunk: Chunk) -> tuple[Tensor, list[Tensor]]:
        """Values (C, J) and extras (C, ...); where wanted, the gradient by the product is written.

        It is that of ``sum(row_weights * values)``, and goes to the first V columns of
        ``chunk.dlogits``, or to ``chunk.entries``.
        """

    def extras(self) -> list[tuple[bool, tuple[int, ...]]]:
        """Of each extra: whether it holds token ids, and its shape behind the token axis."""

    @property
    def num_values(self) -> int:
        """J."""

    @property
    def num_entries(self) -> int:
        """K, where the gradient has so many entries and no others; 0: it may have all."""

    @property
    def whole_sides(self) -> tuple[bool, bool]:
        """Whether the whole logits of the student, and of a teacher, are read."""

    def replay(self, extras: list[Tensor]) -> tuple["Objective", list[Tensor]]:
        """The row function of a second walk, and inputs for it beside the first walk's.

        A choice that the first walk made must not be made anew.
        """
