"""Row indices into verl's packed micro-batch: which rows need a loss, and where they are.

verl packs the sequences of a micro-batch one behind another, without padding between them.  Row i
of the packed batch predicts token i + 1.  Under Ulysses sequence parallelism each rank's forward
returns one contiguous shard of the packed rows.

Dimension key:  B sequences, N packed rows, R rows whose outputs are computed on this rank
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor


def predicting_rows(batch: TensorDict) -> Tensor:
    """Return the packed rows that predict a token with a loss: (R,) int64, ascending.

    These tokens are the response tokens that ``response_mask`` keeps or, in a batch without
    responses (SFT), the tokens that ``loss_mask`` keeps.
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
    """Look up a per-response-token tensor at packed rows.

    Args:
        batch: verl's micro-batch.
        name: key of a tensor (B, response tokens), padded or jagged.
        rows: (R,) packed rows; each predicts a response token.

    Returns:
        (R,) the values of the tokens that the rows predict.
    """
    values = batch[name]
    if values.is_nested:
        values = values.to_padded_tensor(0)
    offsets = batch["input_ids"].offsets()
    sequence = _sequence_of(rows, offsets)
    first = offsets[1:] - _response_lengths(batch) - 1
    return values[sequence, rows - first[sequence]]


def _response_lengths(batch: TensorDict) -> Tensor:
    """Return the response lengths (B,), as verl's ``no_padding_2_padding`` reads them.

    verl's v1 trainer sends jagged responses; its older path sends padded ones beside jagged
    ``input_ids``, where only the attention mask tells the lengths.
    """
    responses = batch["responses"]
    if responses.is_nested:
        return responses.offsets().diff()
    return batch["attention_mask"][:, batch["prompts"].shape[1] :].sum(1)


def matching_rows(rows: Tensor, offsets: Tensor, other_offsets: Tensor) -> Tensor:
    """Map packed rows to those of another batch whose sequences end with the same tokens.

    Args:
        rows: (R,) rows of the first packed batch.
        offsets, other_offsets: (B + 1,) sequence offsets of the first and of the other batch.

    Returns:
        (R,) rows of the other batch, equally far from the end of their sequence.
    """
    sequence = _sequence_of(rows, offsets)
    return rows + (other_offsets - offsets)[sequence + 1]


def verls_positions(position_ids: Any) -> Tensor:
    """Return the teacher's positions as verl has the student's.

    Args:
        position_ids: jagged (B, L), or (B, L, 4) for M-RoPE.

    Returns:
        Jagged (B, L), or (B, 4, L).
    """
    if position_ids.dim() == 2:
        found: Tensor = position_ids
        return found
    values = position_ids.values().t().contiguous()
    return torch.nested.nested_tensor_from_jagged(values, position_ids.offsets(), jagged_dim=2)


def _sequence_of(rows: Tensor, offsets: Tensor) -> Tensor:
    return torch.bucketize(rows, offsets, right=True) - 1


@dataclass(frozen=True, eq=False)
class Shard:
    """The contiguous packed rows that this rank's forward returns.

    Attributes:
        offsets: (B + 1,) offsets of the sequences in the whole packed batch.
        start: first row of the shard.
        num_rows: number of rows, including padding at the end of the packed batch.
        width: sequence length of the padded batch (B, width) that the forward returns if verl's
            ``use_remove_padding`` is off; None if the forward runs on packed rows.
    """

    offsets: Tensor
    start: int
    num_rows: int
    width: int | None = None

    def owned(self, rows: Tensor) -> Tensor:
        """Return those of the packed rows that lie in this shard."""
        return rows[(rows >= self.start) & (rows < self.start + self.num_rows)]

    def positions(self, rows: Tensor) -> Tensor:
        """Return the flat positions of owned rows (R,) in the forward's output."""
        if self.width is None:
            return rows - self.start
        sequence = _sequence_of(rows, self.offsets)
        return sequence * self.width + rows - self.offsets[sequence]

    def scatter(self, values: Tensor, rows: Tensor) -> Tensor:
        """Write the values (R,) of owned rows into (num_rows,) zeros."""
        return values.new_zeros(self.num_rows).index_copy(0, rows - self.start, values)


@dataclass(frozen=True, eq=False)
class PlacedRows:
    """The rows computed on this rank, and the way back to verl's ``model_output``.

    Attributes:
        shard: the rows that this rank's forward returns.
        rows: (R,) packed rows inside the shard.
        gather: maps values of the shard's rows to values of all packed rows, without padding.
    """

    shard: Shard
    rows: Tensor
    gather: Callable[[Tensor], Tensor]

    @property
    def positions(self) -> Tensor:
        """Flat positions (R,) of the rows in the forward's output."""
        return self.shard.positions(self.rows)

    def to_jagged(self, values: Tensor) -> Tensor:
        """Turn values (R,) into a jagged tensor shaped like ``input_ids``, 0 in other rows."""
        packed = self.gather(self.shard.scatter(values, self.rows))
        return torch.nested.nested_tensor_from_jagged(packed, self.shard.offsets)
