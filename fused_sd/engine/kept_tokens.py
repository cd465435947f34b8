"""Which tokens are walked: those that have a weight.

Dimension key:  N tokens, A tokens that are walked
"""

import torch
from torch import Tensor


class KeptTokens:
    """The tokens that have a weight: chosen before the walk, put back in their places after it.

    Without compaction every token is walked; those of weight 0 are emptied first, so that nothing
    they hold can reach a sum.
    """

    def __init__(self, row_weights: Tensor, compact: bool) -> None:
        alive = (row_weights != 0).any(-1)
        capturing = row_weights.is_cuda and torch.cuda.is_current_stream_capturing()
        self.index = alive.nonzero()[:, 0] if compact and not capturing else None
        self.alive = alive
        self.all = self.index is not None and self.index.numel() == alive.numel()

    def select(self, tensor: Tensor) -> Tensor:
        """The rows (A, ...) of the active tokens."""
        if self.all:
            return tensor
        if self.index is not None:
            return tensor.index_select(0, self.index)
        return torch.where(self._along(tensor), tensor, 0)

    def clear_(self, selected: Tensor) -> Tensor:
        """Selected rows, 0 where they belong to a token without a weight."""
        return selected.masked_fill_(~self._along(selected), 0) if self.index is None else selected

    def restored(self, selected: Tensor) -> Tensor:
        """Rows (N, ...) of all tokens, 0 for those without a weight."""
        if self.all or self.index is None:
            return self.clear_(selected)
        rows = selected.new_zeros((self.alive.numel(), *selected.shape[1:]))
        return rows.index_copy_(0, self.index, selected)

    def tokens(self, selected: Tensor) -> Tensor:
        """Which of all tokens the given active ones are."""
        return selected if self.all or self.index is None else self.index[selected]

    def _along(self, tensor: Tensor) -> Tensor:
        return self.alive.view(-1, *[1] * (tensor.dim() - 1))
