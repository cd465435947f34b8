"""Which rows of verl's packed micro-batch are computed, and where they are.

verl packs the sequences of a micro-batch one behind another; row i of the packed batch predicts its
token i + 1.  Under Ulysses each rank's forward returns one shard of the packed rows.

Dimension key:  B sequences, N packed rows, R rows that are computed here
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from tensordict import TensorDict
from torch import Tensor


def predicting_rows(batch: TensorDict) -> Tensor:
    """The packed rows that predict tokens which count: (R,) int64, ascending.

    Those are the response tokens that ``response_mask`` keeps; without responses (SFT) the tokens
    that ``loss_mask`` keeps.
    """
    offsets = batch["input_ids"].offsets()
    if "responses" not in batch:
        return torch.roll(batch["loss_mask"].values(), -1).nonzero()[:, 0]
    mask = batch["response_mask"]
    lengths = _response_lengths(batch)
    if mask.is_nested:
        mask = torch.nested.to_padded_tensor(mask.long(), 0)
    columns = torch.arange(mask.shape[1], device=mask.device)
    kept = (mask != 0) & (columns < lengths[:, None])
    return ((offsets[1:] - lengths - 1)[:, None] + columns)[kept]


def response_values(batch: TensorDict, name: str, rows: Tensor) -> Tensor:
    """A tensor of the response tokens, (B, tokens) padded or jagged, at packed rows (R,)."""
    values = batch[name]
    if values.is_nested:
        values = values.to_padded_tensor(0)
    offsets = batch["input_ids"].offsets()
    sequence = _sequence_of(rows, offsets)
    first = offsets[1:] - _response_lengths(batch) - 1
    return values[sequence, rows - first[sequence]]


def _response_lengths(batch: TensorDict) -> Tensor:
    """(B,), as verl's ``no_padding_2_padding`` reads them."""
    responses = batch["responses"]
    if responses.is_nested:
        return responses.offsets().diff()
    return batch["attention_mask"][:, batch["prompts"].shape[1] :].sum(1)


def moved_rows(rows: Tensor, before: Tensor, after: Tensor) -> Tensor:
    """Rows of another packed batch that are as far from the ends of their sequences.

    Args:
        rows: (R,), of the first packed batch.
        before, after: offsets of both packed batches, (B + 1,).
    """
    sequence = _sequence_of(rows, before)
    return rows + (after - before)[sequence + 1]


def _sequence_of(rows: Tensor, offsets: Tensor) -> Tensor:
    return torch.bucketize(rows, offsets, right=True) - 1


@dataclass(frozen=True, eq=False)
class Shard:
    """The packed rows that this rank's forward returns.

    Attributes:
        offsets: of the sequences, (B + 1,).
        start, num_rows: the first row and how many, padding at the end of the batch included.
        width: of the padded batch (B, width) that the forward returns instead; None: packed.
    """

    offsets: Tensor
    start: int
    num_rows: int
    width: int | None = None

    def owned(self, rows: Tensor) -> Tensor:
        """Those of the packed rows (R,) that are here."""
        return rows[(rows >= self.start) & (rows < self.start + self.num_rows)]

    def positions(self, rows: Tensor) -> Tensor:
        """Where owned rows (R,) are among all positions of what the forward returns."""
        if self.width is None:
            return rows - self.start
        sequence = _sequence_of(rows, self.offsets)
        return sequence * self.width + rows - self.offsets[sequence]

    def spread(self, values: Tensor, rows: Tensor) -> Tensor:
        """Values (R,) of owned rows at their places among the shard's rows, 0 elsewhere."""
        return values.new_zeros(self.num_rows).index_copy(0, rows - self.start, values)


@dataclass(frozen=True, eq=False)
class Placed:
    """The rows that are computed here, and how a row's values become verl's model output.

    Attributes:
        rows: (R,), owned rows of the packed batch.
        gather: from the shard's rows to those of the whole packed batch, without padding.
    """

    shard: Shard
    rows: Tensor
    gather: Callable[[Tensor], Tensor]

    @property
    def positions(self) -> Tensor:
        return self.shard.positions(self.rows)

    def nested(self, values: Tensor) -> Tensor:
        """Values (R,) as a jagged tensor like ``input_ids``."""
        packed = self.gather(self.shard.spread(values, self.rows))
        return torch.nested.nested_tensor_from_jagged(packed, self.shard.offsets)
