"""The gradient that is sparse where that pays: ``gradient="auto"``.

Dimension key:  R rows of a group
"""

import torch

from fused_sd.engine.backend import Functions
from fused_sd.engine.gradients import DENSE_SHARE, CertifiedGradients
from fused_sd.engine.saved import Wanted
from fused_sd.engine.workspace import Workspace
from fused_sd.head.projection import accumulation_dtype
from fused_sd.torch_kernels.selection import Selection


class AutoGradients(CertifiedGradients):
    """Certified gradients while that pays, else dense ones that are not searched.

    While at most ``DENSE_SHARE`` of the rows searched so far are dense, groups are certified as
    with ``gradient="sparse"``, to the bit.  Else the first chunk of a group is searched, so that
    the run notices a change, and the rest is dense as it stands: it costs what a dense gradient
    costs and a pass for its norms, and the host does not wait for it.  The first chunk of a run is
    searched alone for the same reason.

    Nothing is remembered from one run to the next, so a step repeats from any checkpoint.  Ranks
    that share the vocabulary decide alike, because a row is dense on all of them or on none.  While
    a CUDA graph is captured nothing can be counted, and every row is dense.

    With ``reduction="none"`` and a trained head, backward computes the logits of dense tokens
    again, as it does for a dense gradient; forward's pass over their gradients is then spent on the
    norms alone.
    """

    def __init__(
        self,
        workspace: Workspace,
        functions: Functions,
        wanted: Wanted,
        tolerance: float,
        reduced: bool,
    ) -> None:
        super().__init__(workspace, functions, wanted, tolerance, reduced)
        hidden = workspace.student.hidden
        self.may_search = not (hidden.is_cuda and torch.cuda.is_current_stream_capturing())
        self.num_searched = self.num_dense = 0  # rows of decided groups
        self.probe: Selection | None = None  # of a group's first chunk, which waits for the rest
        self.rest = 0  # tokens that the rest of the group may have; 0: a new group begins

    def tokens_that_fit(self) -> int:
        if self.rest:
            return self.rest
        is_whole = not self.may_search or self._pays(self.num_searched, self.num_dense)
        return super().tokens_that_fit() if is_whole else self.workspace.layout.chunk

    def accumulate(self, group: slice) -> None:
        if not self.may_search or (self.rest and self.probe is None):
            self._take_unsearched(group)
            return
        is_first_chunk = not self.rest and not self._pays(self.num_searched, self.num_dense)
        room, selection = super().tokens_that_fit(), self._select(group)
        if self.probe is not None:
            selection, group = self._behind_probe(selection, group)
        decided, count = self._decide(selection), group.stop - group.start
        num_searched = self.num_searched + count
        num_dense = self.num_dense + decided.num_dense
        self.rest = 0
        if is_first_chunk and group.stop < self.workspace.student.hidden.shape[0]:
            self.rest = room - count
            if self.rest and self._pays(num_searched, num_dense):
                self.probe, self.first_row = selection, self.first_row + count
                return
        self.num_searched, self.num_dense = num_searched, num_dense
        self._take(decided, group)
        if not self.rest:
            self._flush_if_long()

    def _take_unsearched(self, group: slice) -> None:
        rows = self._rows(group)
        wide = accumulation_dtype(rows.dtype)
        self._take_dense(torch.linalg.vector_norm(rows, 1, dim=-1, dtype=wide), group)
        self.rest = 0
        self._flush_if_long()

    def _behind_probe(self, selection: Selection, group: slice) -> tuple[Selection, slice]:
        """The selection and the tokens of a whole group, whose first chunk waited for the rest."""
        assert self.probe is not None
        count = self.probe.norm.numel()
        whole = Selection(*(torch.cat(pair) for pair in zip(self.probe, selection, strict=True)))
        self.probe, self.first_row = None, self.first_row - count
        return whole, slice(group.start - count, group.stop)

    def _pays(self, num_searched: int, num_dense: int) -> bool:
        """Whether rows were searched, and few enough of them are dense."""
        return num_searched > 0 and num_dense <= DENSE_SHARE * num_searched
