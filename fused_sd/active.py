"""Which tokens are walked: those that have a weight."""

import torch
from torch import Tensor


class ActiveTokens:
    """The tokens that have a weight: chosen before the walk, put back in their places after it.

    Without compaction every token is walked; those of weight 0 are emptied first, so that nothing
    they hold can reach a sum.
    """

    PER_TOKEN = (1, 2)  # of the outputs: values and dhidden, and all from the extras on

    def __init__(self, upstream: Tensor, compact: bool) -> None:
        alive = (upstream != 0).any(-1)
        capturing = upstream.is_cuda and torch.cuda.is_current_stream_capturing()
        self.index = alive.nonzero()[:, 0] if compact and not capturing else None
        self.alive = alive
        self.all = self.index is not None and self.index.numel() == alive.numel()

    def select(self, tensor: Tensor) -> Tensor:
        """The tensor's rows of the active tokens."""
        if self.all:
            return tensor
        if self.index is not None:
            return tensor.index_select(0, self.index)
        return torch.where(self._along(tensor), tensor, 0)

    def dead(self, tensor: Tensor) -> Tensor:
        """Where the selected rows belong to a token without a weight."""
        if self.index is not None:
            return tensor.new_zeros((), dtype=torch.bool)
        return ~self._along(tensor)

    def buffer(self, output: Tensor, at: int) -> Tensor:
        """Where the walk writes an output: itself, or as many rows as are active."""
        if self.all or self.index is None or not self._per_token(output, at):
            return output
        return output.new_empty((self.index.numel(), *output.shape[1:]))

    def restore(self, output: Tensor, buffer: Tensor, at: int) -> None:
        """Put the active tokens' rows in their places."""
        if not self._per_token(output, at):
            return
        if self.index is None:
            output.masked_fill_(self.dead(output), 0)
        elif buffer is not output:
            output.index_copy_(0, self.index, buffer)

    def _per_token(self, output: Tensor, at: int) -> bool:
        return (at in self.PER_TOKEN and output.shape[0] == self.alive.shape[0]) or at >= 5

    def _along(self, tensor: Tensor) -> Tensor:
        return self.alive.view(-1, *[1] * (tensor.dim() - 1))
