"""Sequences of padded or packed rows, flattened to one list of tokens without padding.

A *token* here is an index into that list, from 0 to M - 1.  A *place* is an index into the
flattened (B, L) tensors, where hidden states are looked up.

Dimension key:  B rows, L positions, M tokens that are not padding
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from fused_sd.checks import fail
from fused_sd.checks.tensors import INTEGER, check_dtype, check_integers, check_mask, check_tensor


@dataclass(frozen=True, eq=False)
class Sequences:
    """The student's or the teacher's sequences of a batch."""

    name: str  # "student" or "teacher", for messages
    shape: tuple[int, int]  # (B, L)
    places: Tensor  # (M,) int64, ascending
    ids: Tensor  # (M,) int64
    numbers: Tensor  # (M,) int64, the sequence of each token, ascending

    @classmethod
    def of(cls, name: str, ids: Tensor, mask: Tensor, sequence_ids: Tensor | None) -> "Sequences":
        """Flatten a batch (B, L); without ``sequence_ids`` each row is one sequence."""
        check_tensor(f"{name}_ids", ids)
        check_integers(f"{name}_ids", ids)
        if ids.is_meta:
            fail(f"{name}_ids", "have values", "a tensor on the meta device", "pass real ids")
        if ids.dim() != 2:
            fail(f"{name}_ids", "be (B, L)", tuple(ids.shape), "give one row for one sequence")
        if sequence_ids is None:
            sequence_ids = torch.arange(ids.shape[0], device=ids.device)[:, None].expand_as(ids)
        for what, value in (("mask", mask), ("sequence_ids", sequence_ids)):
            check_tensor(f"{name}_{what}", value)
            if value.shape != ids.shape:
                rule = f"be {tuple(ids.shape)} as {name}_ids"
                fail(f"{name}_{what}", rule, tuple(value.shape), "pass one value for each id")
            if value.device != ids.device:
                rule = f"be on {ids.device} as {name}_ids"
                fail(f"{name}_{what}", rule, value.device, f"move it to {ids.device}")
        check_dtype(f"{name}_sequence_ids", sequence_ids, INTEGER, "pass int64 numbers")
        check_mask(f"{name}_mask", mask)
        places = mask.flatten().nonzero()[:, 0]
        numbers = sequence_ids.flatten()[places].long()
        if (numbers.diff() < 0).any():
            remedy = "number them from left to right"
            fail(f"{name}_sequence_ids", "ascend", numbers.unique_consecutive().tolist(), remedy)
        if (numbers < 0).any():
            remedy = "count sequences from 0; only padding may have other numbers"
            fail(f"{name}_sequence_ids", "be at least 0", int(numbers.min()), remedy)
        return cls(
            name, (ids.shape[0], ids.shape[1]), places, ids.flatten()[places].long(), numbers
        )

    def where(self, token: int) -> str:
        """Describe where a token is, for messages."""
        column = int(self.places[token]) % self.shape[1]
        return f"sequence {int(self.numbers[token])}, position {column}"

    def response(self, mask: Tensor) -> Tensor:
        """Return the tokens that a response mask (B, L) marks."""
        check_mask(f"{self.name}_response_mask", mask)
        if mask.shape != self.shape:
            got = tuple(mask.shape)
            fail(f"{self.name}_response_mask", f"be {self.shape} as ids", got, "mark each id")
        if mask.device != self.ids.device:
            rule = f"be on {self.ids.device} as {self.name}_ids"
            fail(f"{self.name}_response_mask", rule, mask.device, f"move it to {self.ids.device}")
        marked = mask.flatten() != 0
        tokens = marked[self.places].nonzero()[:, 0]
        if int(marked.sum()) != tokens.numel():
            fail(
                f"{self.name}_response_mask",
                "be 0 where the attention mask is",
                f"{int(marked.sum()) - tokens.numel()} padded tokens",
                "multiply it by the attention mask",
            )
        return tokens

    def predecessors(self, tokens: Tensor) -> Tensor:
        """Return the places of the states that predict these tokens."""
        before = (tokens - 1).clamp(min=0)
        alone = (tokens == 0) | (self.numbers[before] != self.numbers[tokens])
        if alone.any():
            first = int(tokens[alone][0])
            got = f"a response from the first token on ({self.where(first)})"
            fail(f"{self.name}_ids", "hold a prompt before the response", got, "keep one token")
        return self.places[before]

    def tokens_at(self, places: Tensor) -> Tensor:
        """Return the tokens at these places; a place of padding is an error."""
        if self.places.numel() == 0 and places.numel() == 0:
            return places
        found = torch.searchsorted(self.places, places)
        found = found.clamp(max=self.places.numel() - 1)
        padding = self.places[found] != places
        if padding.any():
            first = int(padding.nonzero()[0])
            got = f"{int(places[first])}, which is padding or outside"
            remedy = "select positions where the mask is 1"
            fail(f"alignment.{self.name}_positions[{first}]", "be a token's", got, remedy)
        return found

    def check_predictions(self, places: Tensor, token_ids: Tensor) -> None:
        """Check that the token after each place has the given id."""
        tokens = self.tokens_at(places)
        wrong = self._ids_ahead(tokens, 1) != token_ids
        if not wrong.any():
            return
        remedy = "build them with align_responses"
        # the usual mistakes are positions of the tokens themselves, and one too early
        for ahead, advice in ((0, "one late: subtract 1"), (2, "one early: add 1")):
            if torch.equal(self._ids_ahead(tokens, ahead), token_ids):
                remedy = f"all of them are {advice}"
        first = int(wrong.nonzero()[0])
        follower = int(self._ids_ahead(tokens, 1)[first])
        fail(
            f"alignment.{self.name}_positions[{first}]",
            f"be followed by token {int(token_ids[first])}",
            f"{'the end' if follower < 0 else f'token {follower}'} after "
            f"{self.where(int(tokens[first]))}",
            remedy,
        )

    def _ids_ahead(self, tokens: Tensor, count: int) -> Tensor:
        """Return the ids ``count`` tokens later in the same sequence, -1 behind its end."""
        later = (tokens + count).clamp(max=max(self.ids.numel() - 1, 0))
        same = (later == tokens + count) & (self.numbers[later] == self.numbers[tokens])
        return torch.where(same, self.ids[later], -1)
