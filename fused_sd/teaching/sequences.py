"""The tokens of ragged, padded or packed rows, without the padding.

Dimension key:  B rows, L positions, M tokens that are not padding
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from fused_sd.checks import fail


@dataclass(frozen=True, eq=False)
class Side:
    """One side's tokens in order.  A token is named by its number among them."""

    name: str
    shape: tuple[int, int]  # (B, L)
    places: Tensor  # (M,) ascending, into the flattened (B, L)
    ids: Tensor  # (M,)
    sequences: Tensor  # (M,) ascending

    @classmethod
    def of(cls, name: str, ids: Tensor, mask: Tensor, sequence_ids: Tensor | None) -> "Side":
        if ids.dim() != 2:
            fail(f"{name}_ids", "be (B, L)", tuple(ids.shape), "give one row for one sequence")
        if sequence_ids is None:
            sequence_ids = torch.arange(ids.shape[0], device=ids.device)[:, None].expand_as(ids)
        for what, value in (("mask", mask), ("sequence_ids", sequence_ids)):
            if value.shape != ids.shape:
                rule = f"be {tuple(ids.shape)} as {name}_ids"
                fail(f"{name}_{what}", rule, tuple(value.shape), "pass one value for each id")
        places = mask.flatten().nonzero()[:, 0]
        sequences = sequence_ids.flatten()[places].long()
        if (sequences.diff() < 0).any():
            remedy = "number them from left to right"
            fail(f"{name}_sequence_ids", "ascend", sequences.unique_consecutive().tolist(), remedy)
        return cls(
            name, (ids.shape[0], ids.shape[1]), places, ids.flatten()[places].long(), sequences
        )

    def where(self, token: int) -> str:
        """A token's place, for messages."""
        column = int(self.places[token]) % self.shape[1]
        return f"sequence {int(self.sequences[token])}, position {column}"

    def response(self, mask: Tensor) -> Tensor:
        """Which tokens a response mask marks."""
        if mask.shape != self.shape:
            got = tuple(mask.shape)
            fail(f"{self.name}_response_mask", f"be {self.shape} as ids", got, "mark each id")
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
        """Places of the tokens whose states predict these."""
        before = (tokens - 1).clamp(min=0)
        alone = (tokens == 0) | (self.sequences[before] != self.sequences[tokens])
        if alone.any():
            first = int(tokens[alone][0])
            got = f"a response from the first token on ({self.where(first)})"
            fail(f"{self.name}_ids", "hold a prompt before the response", got, "keep one token")
        return self.places[before]

    def order(self, places: Tensor) -> Tensor:
        """Which tokens lie at these places."""
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
        """Each place's next token has to be the one given."""
        tokens = self.order(places)
        wrong = self._ahead(tokens, 1) != token_ids
        if not wrong.any():
            return
        remedy = "build them with align_responses"
        for ahead, advice in ((0, "one late: subtract 1"), (2, "one early: add 1")):
            if torch.equal(self._ahead(tokens, ahead), token_ids):
                remedy = f"all of them are {advice}"
        first = int(wrong.nonzero()[0])
        follower = int(self._ahead(tokens, 1)[first])
        fail(
            f"alignment.{self.name}_positions[{first}]",
            f"be followed by token {int(token_ids[first])}",
            f"{'the end' if follower < 0 else f'token {follower}'} after "
            f"{self.where(int(tokens[first]))}",
            remedy,
        )

    def _ahead(self, tokens: Tensor, count: int) -> Tensor:
        """Ids of the tokens ``count`` later in the same sequence, -1 behind its end."""
        later = (tokens + count).clamp(max=max(self.ids.numel() - 1, 0))
        same = (later == tokens + count) & (self.sequences[later] == self.sequences[tokens])
        return torch.where(same, self.ids[later], -1)
