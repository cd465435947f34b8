"""The interface between the chunk loop and an objective: ``Chunk`` and the ``Objective`` protocol.

The loop (``engine/operator.py``) makes a chunk's logits and hands an objective a ``Chunk``: the
logits of both sides, the per-token inputs, the memory for the gradient, and the kernels of the
backend.  The objective (``objectives/``) returns a few values for each token and, where a gradient
is wanted, writes the gradient w.r.t. the logits into the chunk.  An objective never sees hidden
states or heads, and the loop never sees what is computed.

Where ranks share the vocabulary, a chunk holds the columns of one rank; its methods combine what
the ranks have, so that an objective reads as if the vocabulary were whole.

Dimension key:  C tokens in a chunk, W columns of a chunk's logits, V vocabulary, J values for each
                token, K chosen entries of a row
"""

from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from fused_sd.engine.backend import Functions
from fused_sd.head.vocab_shard import VocabShard
from fused_sd.terms.support import SideName
from fused_sd.torch_kernels.rows import EntryGradient, log_probs


class Side(NamedTuple):
    """One side's logits of a chunk, in fp32 or fp64, over this rank's columns."""

    # (C, W), may be overwritten; -inf behind the vocabulary, and left so; None: not made
    whole: Tensor | None
    vocab: int  # columns of the vocabulary
    dot_products: Callable[[Tensor], Tensor]  # logits (C, K) at given columns, without the whole


class SparseBuffers(NamedTuple):
    """Where a chunk's gradient goes if it has K values for each token and no others."""

    columns: Tensor  # (C, K) int32
    values: Tensor  # (C, K)
    vocab: int  # the column that marks a place without a value


class Chunk(NamedTuple):
    """What an objective reads and writes of a chunk."""

    student_side: Side
    teacher_side: Side | None
    dlogits: Tensor | None  # (C, W) for the gradient; may be the memory of the student's logits
    sparse: SparseBuffers | None  # for the gradient, where the objective has num_sparse_values
    columns: int  # how many columns a comparison of both sides reads
    width: int  # W
    inputs: list[Tensor]  # per-token inputs, each (C, ...)
    # (C, J) or (C, 1) factors of the values' gradients w.r.t. products of states and head, with the
    # logits' own factor in them; None where no gradient is wanted
    row_weights: Tensor | None
    cap: float | None  # soft-cap of the student's logits
    functions: Functions  # kernels of the backend
    shard: VocabShard  # which columns these are
    known_top_k: dict[SideName, Tensor]  # what ``top_k`` has found, (C, k) of each side

    @property
    def student(self) -> Tensor:
        """The student's whole logits (C, W), for an objective that has them made."""
        assert self.student_side.whole is not None
        return self.student_side.whole

    @property
    def teacher(self) -> Tensor | None:
        """The teacher's whole logits (C, W), where they are made."""
        return None if self.teacher_side is None else self.teacher_side.whole

    def side(self, name: SideName) -> Side:
        """Return one side by its name."""
        side = self.student_side if name == "student" else self.teacher_side
        assert side is not None
        return side

    def sides(self) -> tuple[Tensor, Tensor]:
        """The logits (C, columns) of both sides, as a comparison reads them."""
        assert self.teacher is not None
        return self.student[:, : self.columns], self.teacher[:, : self.columns]

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

    def top_k(self, side: SideName, k: int) -> Tensor:
        """Ids (C, k) of a side's largest logits, largest first, equal logits by lowest id."""
        known = self.known_top_k.get(side)
        if known is None or known.shape[1] < k:
            whole = self.side(side).whole
            assert whole is not None
            known = self.shard.top_k(self.functions.sparse.top_k, whole, k)
            self.known_top_k[side] = known
        return known[:, :k]

    def log_probs(self, side: SideName, ids: Tensor) -> Tensor:
        """A side's log-probabilities (C, K) of ids, over the vocabulary of all ranks."""
        whole = self.side(side).whole
        lse = self.functions.rows.log_normalizer(whole)
        part = self.part(self.side(side), ids)
        [lse], _, [chosen] = self.shard.join([lse], extra_sums=[part], dtype=part.dtype)
        return log_probs(chosen, lse)

    def log_normalizer(self, side: SideName) -> Tensor:
        """Log-sum-exp (C,), fp64, of a side's logits over the vocabulary of all ranks."""
        whole = self.side(side).whole
        assert whole is not None
        lse = self.functions.rows.log_normalizer(whole)
        return self.shard.join([lse], dtype=whole.dtype).normalizers[0]

    def write_gradient_(
        self,
        background: Tensor | None,  # (C,) fp64 normaliser of the entries outside; None: they get 0
        constant: Tensor | None,  # (C,)
        slope: Tensor | None,  # (C,)
        entries: EntryGradient,  # columns are this rank's; V and above: nowhere
    ) -> None:
        """Write a gradient that is a softmax over the whole row, but for K entries of their own.

        Outside the columns it is ``exp(x) (constant + slope x)`` of ``x = logit - background``.
        The entries' values are set and not added, so that each is rounded once.  A soft-cap's
        derivative is applied here.
        """
        cap, dlogits = self.cap, self.dlogits
        if self.sparse is not None:
            vocab, columns = self.sparse.vocab, entries.columns
            self.sparse.columns.copy_(columns.clamp(max=vocab))
            self.sparse.values.copy_(entries.weighted(cap).masked_fill(columns >= vocab, 0))
            return
        assert dlogits is not None
        if background is None:
            dlogits.zero_().scatter_(1, entries.columns, entries.weighted(cap).to(dlogits.dtype))
            return
        fill = self.functions.rows.softmax_gradient_
        fill(self.student, background, constant, slope, cap, dlogits, entries)


class Objective(Protocol):
    """What is done with a chunk of logits."""

    def __call__(self, chunk: Chunk) -> tuple[Tensor, list[Tensor]]:
        """Compute values (C, J) and extras (C, ...) of a chunk, and write its gradient.

        Where ``chunk.row_weights`` are given, the gradient of ``sum(row_weights * values)`` w.r.t.
        the logits, but through their soft-cap, goes to the first V columns of ``chunk.dlogits``, or
        to ``chunk.sparse``.
        """

    def extras(self) -> list[tuple[bool, tuple[int, ...]]]:
        """For each extra: whether it holds token ids, and its shape behind the token axis."""

    @property
    def num_values(self) -> int:
        """J."""

    @property
    def num_sparse_values(self) -> int:
        """Number of values that make up a token's whole gradient; 0: it may reach every entry."""

    @property
    def whole_sides(self) -> tuple[bool, bool]:
        """Whether the whole logits of the student, and of a teacher, are read."""

    def replay(self, extras: list[Tensor]) -> tuple["Objective", list[Tensor]]:
        """Return the objective that backward runs, and the inputs to append to the first run's.

        An objective that chose entries in forward returns one that reads them instead of choosing
        again.
        """
