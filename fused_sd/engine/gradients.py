"""How dlogits become dhidden and dweight: dense (two GEMMs), sparse (kept values), or certified.

A certified gradient is, for each token, one of both: its largest values where they are enough for
the tolerance, else the whole row.

Dimension key:  N tokens, V vocabulary, K sparse values of a token
"""

from typing import NamedTuple

import torch
from torch import Tensor

from fused_sd.engine.backend import Functions
from fused_sd.engine.budget import needs_dense, row_share, smallest_kept
from fused_sd.engine.certificate import mean_row
from fused_sd.engine.chunk import SparseBuffers
from fused_sd.engine.kept_tokens import KeptTokens
from fused_sd.engine.saved import Dense, Sparse, Wanted, starts_of
from fused_sd.engine.workspace import Workspace
from fused_sd.head.projection import accumulation_dtype
from fused_sd.torch_kernels.selection import Selection

MOST = 512  # most sparse values of a row; with more, gathering rows of the head saves little
# Share of dense rows above which sparse ones do not pay.  In units u of a GEMM of all rows with the
# head, the sparse share 1 - f saves two GEMMs, less the gathers g of its values; s is spent on
# selecting and deciding for every row, m on moving the dense ones.  It pays while
#     (2u - g) (1 - f) > s + m f.
# Predicted for an H200, 16384 rows and V = 151936, in ms: u = 29.6 D / 4096, s = 4 (all rows read
# once, and a wait of the host for each group), m = 2.3 (a row read and written), g = 17 D / 4096
# (270 values a row, as rows of a policy with so many dense ones keep): up to f = 0.86 at D = 4096,
# 0.73 at 2048, 0.51 at 1024.  Near these shares both forms take equally long.
DENSE_SHARE = 0.75


class DenseGradients:
    """Two GEMMs turn each group's dlogits into dhidden and dweight."""

    first_row = 0  # of the workspace's dlogits that the next group may use

    def __init__(self, workspace: Workspace, wanted: Wanted) -> None:
        self.workspace = workspace
        self.dense = _unfilled(workspace, wanted)

    def sparse_buffers(self, at: slice) -> SparseBuffers | None:
        """Where a chunk's objective writes sparse values; None: it writes dlogits."""
        return None

    def tokens_that_fit(self) -> int:
        """How many tokens the next group may have."""
        return self.workspace.layout.group

    def accumulate(self, group: slice) -> None:
        """Take a group's dlogits out of the workspace, whose memory the next group uses."""
        dhidden, dweight, dbias = self.dense
        rows = dhidden[group] if dhidden.numel() else dhidden
        self.workspace.accumulate(group, rows, dweight, dbias, is_first=group.start == 0)

    def finish(self, kept: KeptTokens) -> tuple[Dense, Sparse]:
        """The gradients of all tokens."""
        dhidden, dweight, dbias = self.dense
        if self.workspace.student.hidden.shape[0] == 0:
            dweight.zero_()
        if dhidden.dim() == 2:
            if self.workspace.shard.reduce_dhidden:
                self.workspace.shard.sum_(dhidden)
            dhidden = kept.restored(dhidden)
        return Dense(dhidden, dweight, dbias), Sparse.none(self.workspace.logits)


class SparseGradients(DenseGradients):
    """Keeps the sparse values that the objective writes, which are the whole gradient."""

    def __init__(self, workspace: Workspace, num_tokens: int, num_values: int) -> None:
        super().__init__(workspace, (False, False, False))
        shape, vocab = (num_tokens, num_values), workspace.student.vocab
        hidden = workspace.student.hidden
        self.columns = hidden.new_full(shape, vocab, dtype=torch.int32)
        self.values = workspace.logits.new_zeros(shape)

    def sparse_buffers(self, at: slice) -> SparseBuffers:
        return SparseBuffers(self.columns[at], self.values[at], self.workspace.student.vocab)

    def accumulate(self, group: slice) -> None:
        """Does nothing: the objective wrote the values into their final memory."""

    def finish(self, kept: KeptTokens) -> tuple[Dense, Sparse]:
        num_tokens, num_values = self.columns.shape
        num_kept = self.workspace.student.hidden.shape[0]
        columns, values = self.columns[:num_kept], self.values[:num_kept]
        places = torch.full((num_kept,), num_values, device=columns.device)
        if num_kept < num_tokens:
            places = kept.restored(places)
        elif kept.has_weight is not None:  # tokens without a weight have places too, unused ones
            columns.masked_fill_(~kept.has_weight[:, None], self.workspace.student.vocab)
        used = columns < self.workspace.student.vocab
        sparse = Sparse.none(values)._replace(
            columns=self.columns.flatten(),
            values=self.values.flatten(),
            starts=starts_of(places),
            kept=kept.restored(used.sum(-1)),
            norm=kept.restored(values.abs().sum(-1)),
            dropped=values.new_zeros(num_tokens),
        )
        return self.dense, sparse


class Part(NamedTuple):
    """What a group of R rows adds to a certified gradient: E values and F dense tokens."""

    columns: Tensor  # (E,) int32
    values: Tensor  # (E,)
    dense_tokens: Tensor  # (F,) int64
    kept: Tensor  # (R,) int64, number of values of each row
    norm: Tensor  # (R,)
    dropped: Tensor  # (R,)
    dropped_mass: Tensor  # (R,)


class Decision(NamedTuple):
    """Which rows of a group are dense, and which values the others keep."""

    kept: Selection
    is_dense: Tensor  # (R,) bool
    num_values: int
    num_dense: int


class CertifiedGradients(DenseGradients):
    """For each token keeps the largest values where they are enough, the dense row elsewhere.

    A GEMM reads the whole head, so it pays for many rows only.  The dense rows of a group therefore
    move to the front of the workspace's dlogits and wait there for those of the next groups.
    """

    def __init__(
        self,
        workspace: Workspace,
        functions: Functions,
        wanted: Wanted,  # which gradients of dense rows forward finishes
        tolerance: float,
        reduced: bool,
    ) -> None:
        self.workspace, self.functions, self.wanted = workspace, functions, wanted
        self.dense = _unfilled(workspace, wanted, 0, 0)
        self.tolerance, self.reduced = tolerance, reduced
        self.waiting: list[Tensor] = []  # tokens of the rows that wait
        self.dhidden: list[Tensor] = []
        none = Sparse.none(workspace.logits)
        self.parts = [Part(*(getattr(none, name) for name in Part._fields))]

    def tokens_that_fit(self) -> int:
        layout = self.workspace.layout
        return max(layout.chunk, (layout.group - self.first_row) // layout.chunk * layout.chunk)

    def accumulate(self, group: slice) -> None:
        self._take(self._decide(self._select(group)), group)
        self._flush_if_long()

    def _rows(self, group: slice) -> Tensor:
        """A group's dlogits, which lie behind the rows that wait."""
        dlogits = self.workspace.dlogits
        assert dlogits is not None
        stop = self.first_row + group.stop - group.start
        return dlogits[self.first_row : stop, : self.workspace.student.vocab]

    def _select(self, group: slice) -> Selection:
        rows = self._rows(group)
        vocab = rows.shape[1]
        if not vocab:
            return _nothing_to_select(rows)
        share = row_share(self.tolerance, self.reduced)
        selection: Selection = self.functions.sparse.select(rows, share, min(MOST, vocab))
        return selection

    def _decide(self, selection: Selection) -> Decision:
        """Spend the tolerance of a group's rows.  The host waits for two counts, and only here."""
        failed = needs_dense(selection, self.tolerance, self.reduced)
        # a row that is dense on one rank is dense on all, so that all make the same GEMMs
        is_dense = self.workspace.shard.max(failed.byte()).bool()
        threshold = selection.values.new_zeros(())
        if self.reduced:
            threshold = smallest_kept(selection, is_dense, self.tolerance)
        kept: Selection = self.functions.sparse.trim(selection, threshold, is_dense)
        counts = torch.stack([kept.count.sum(), is_dense.sum()]).tolist()
        return Decision(kept, is_dense, *counts)

    def _take(self, decided: Decision, group: slice) -> None:
        """Keep what was decided about the group's rows."""
        kept, is_dense, num_values, num_dense = decided
        if num_dense > DENSE_SHARE * is_dense.numel():
            self._take_dense(kept.norm, group)
            return
        columns, values = self.functions.sparse.compact(kept, num_values)
        dense = torch.nonzero_static(is_dense, size=num_dense)[:, 0]
        tokens = dense + group.start
        self.parts.append(
            Part(columns, values, tokens, kept.count, kept.norm, kept.dropped, kept.dropped_mass)
        )
        self._keep(tokens, dense)

    def _take_dense(self, norm: Tensor, group: slice) -> None:
        """Keep all rows of a group, of given norms."""
        columns, values, *_ = self.parts[0]
        tokens = torch.arange(group.start, group.stop, device=norm.device)
        none = torch.zeros_like(norm)
        self.parts.append(Part(columns, values, tokens, none.long(), norm, none, none))
        self._keep(tokens, None)

    def _keep(self, tokens: Tensor, rows: Tensor | None) -> None:
        """Let the rows of dense tokens wait.

        Args:
            tokens: whose rows they are.
            rows: which rows of the group, ascending; None: all, in their places.
        """
        if not any(self.wanted):  # backward computes them again
            return
        self.waiting.append(tokens)
        to, self.first_row = self.first_row, self.first_row + tokens.numel()
        if rows is None:
            return
        dlogits = self.workspace.dlogits
        assert dlogits is not None
        for part in (rows + to).split(self.workspace.layout.chunk):
            # no row moves backwards, so a row that is overwritten has already moved
            dlogits[to : to + part.numel()] = dlogits.index_select(0, part)
            to += part.numel()

    def _flush_if_long(self) -> None:
        """Accumulate the rows that wait, where few others would fit behind them."""
        if 2 * self.first_row > self.workspace.layout.group:
            self._flush()

    def _flush(self) -> None:
        """Accumulate the rows that wait."""
        tokens, self.waiting, self.first_row = torch.cat(self.waiting), [], 0
        is_first = not self.dhidden
        if is_first:
            self.dense = _unfilled(self.workspace, self.wanted, 0)
        _, dweight, dbias = self.dense
        dhidden = _unfilled(self.workspace, (self.wanted[0], False, False), tokens.numel()).dhidden
        self.dhidden.append(dhidden)
        self.workspace.accumulate(tokens, dhidden, dweight, dbias, is_first=is_first)

    def finish(self, kept: KeptTokens) -> tuple[Dense, Sparse]:
        if self.first_row:
            self._flush()
        parts = Part(*(torch.cat(tensors) for tensors in zip(*self.parts, strict=True)))
        by_token = {
            name: kept.restored(getattr(parts, name))
            for name in ("kept", "norm", "dropped", "dropped_mass")
        }
        dense = self.dense
        if self.dhidden:
            dense = dense._replace(dhidden=torch.cat(self.dhidden))
        sparse = Sparse(
            columns=parts.columns,
            values=parts.values,
            starts=starts_of(by_token["kept"]),
            mean_row=mean_row(self.workspace.student.weight),
            dense_tokens=kept.tokens(parts.dense_tokens),
            **by_token,
        )
        return dense, sparse


def _unfilled(
    workspace: Workspace,
    wanted: Wanted,
    num_tokens: int | None = None,  # None: all that are run
    num_columns: int | None = None,  # None: V
) -> Dense:
    """Allocate the wanted gradients.

    dbias starts at 0, because every group adds to it; the others are written before they are read.
    """
    student, wide = workspace.student, workspace.logits
    num_tokens = student.hidden.shape[0] if num_tokens is None else num_tokens
    num_columns = student.vocab if num_columns is None else num_columns
    width = student.hidden.shape[1]
    shapes = [(num_tokens, width), (num_columns, width), (num_columns,)]
    given = zip(wanted, shapes, strict=True)
    tensors = [wide.new_empty(shape if is_wanted else 0) for is_wanted, shape in given]
    tensors[2].zero_()
    return Dense(*tensors)


def _nothing_to_select(rows: Tensor) -> Selection:
    """The selection of a rank whose columns are all padding."""
    none = rows.new_zeros(rows.shape[0], dtype=accumulation_dtype(rows.dtype))
    columns = rows.new_empty((rows.shape[0], 0), dtype=torch.int32)
    return Selection(columns, columns.to(none.dtype), none.long(), none, none, none)
