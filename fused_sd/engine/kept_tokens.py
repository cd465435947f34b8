"""Which tokens are run: those that have a weight.

Dimension key:  N tokens, K tokens that are kept
"""

import torch
from torch import Tensor


class KeptTokens:
    """Selects the tokens that have a weight, and puts results back in the places of all tokens.

    Without weights every token is kept.  With weights but without compaction every token is run,
    and the rows of tokens of weight 0 are set to 0 first, so that no NaN or infinity in them
    reaches a sum.
    """

    def __init__(self, row_weights: Tensor | None, compact: bool) -> None:
        self.has_weight: Tensor | None = None  # (N,) bool; None: every token is kept
        self.index: Tensor | None = None  # (K,) int64; None: every token is run
        if row_weights is None:
            return
        self.has_weight = (row_weights != 0).any(-1)
        # a graph capture may not read the number of tokens from the device
        capturing = row_weights.is_cuda and torch.cuda.is_current_stream_capturing()
        if compact and not capturing:
            self.index = self.has_weight.nonzero()[:, 0]
            if self.index.numel() == self.has_weight.numel():
                self.has_weight = self.index = None

    def select(self, tensor: Tensor) -> Tensor:
        """The rows (K, ...) of the kept tokens."""
        if self.has_weight is None:
            return tensor
        if self.index is not None:
            return tensor.index_select(0, self.index)
        return torch.where(_along(self.has_weight, tensor), tensor, 0)

    def clear_(self, selected: Tensor) -> Tensor:
        """Set selected rows to 0 where they belong to a token without a weight."""
        if self.has_weight is None or self.index is not None:
            return selected
        return selected.masked_fill_(~_along(self.has_weight, selected), 0)

    def restored(self, selected: Tensor) -> Tensor:
        """Rows (N, ...) of all tokens, 0 for those without a weight."""
        if self.has_weight is None or self.index is None:
            return self.clear_(selected)
        rows = selected.new_zeros((self.has_weight.numel(), *selected.shape[1:]))
        return rows.index_copy_(0, self.index, selected)

    def tokens(self, selected: Tensor) -> Tensor:
        """Positions among all tokens of given kept ones."""
        return selected if self.index is None else self.index[selected]


def _along(by_token: Tensor, tensor: Tensor) -> Tensor:
    """One number for each token in a shape that broadcasts against (N, ...)."""
    return by_token.view(-1, *[1] * (tensor.dim() - 1))
