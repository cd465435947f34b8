"""A vocabulary that lies on several ranks: whose column is whose, and what the ranks tell each
other.

Every rank walks all tokens over its own columns, and only numbers that belong to a token travel:
normalisers (one MAX, one SUM), logits at chosen entries (which ride along), sums over the
vocabulary, and the candidates of a top-k.  What arrives is the same on every rank, bit by bit, so
that all of them go on alike.  A vocabulary that is whole is a shard whose ranks have nothing to
say.

Dimension key:  C tokens, K entries, W columns of this rank's logits
"""

from collections.abc import Callable, MutableMapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from fused_sd import checks
from fused_sd.settings import setting


@setting
class Shards(NamedTuple):
    """How a vocabulary lies on the ranks of a process group."""

    group: str  # its name
    rank: int
    sizes: tuple[int, ...]  # token ids of each rank, in its order
    reduce_dhidden: bool


class Joined(NamedTuple):
    """What the ranks know together."""

    normalizers: list[Tensor]  # (C,) log-sum-exps
    entropies: list[Tensor]  # (C,) nats
    extra_sums: list[Tensor]  # sums


class VocabShard:
    """This rank's columns of the vocabulary, and the way to the other ranks'."""

    def __init__(self, shards: Shards | None, vocab: int) -> None:
        self.alone = shards is None
        self.sizes: tuple[int, ...] = (vocab,)
        self.start, self.stop, self.reduce_dhidden = 0, vocab, False
        self.group: Any = None
        if shards is not None:
            self.sizes, self.reduce_dhidden = shards.sizes, shards.reduce_dhidden
            self.start = sum(shards.sizes[: shards.rank])
            self.stop = self.start + shards.sizes[shards.rank]
            from torch.distributed.distributed_c10d import _resolve_process_group

            self.group = _resolve_process_group(shards.group)  # type: ignore[arg-type]

    def local(self, ids: Tensor) -> tuple[Tensor, Tensor | None]:
        """Columns of ids, and whether they are this rank's; None: all are."""
        if self.alone:
            return ids, None
        is_own = (ids >= self.start) & (ids < self.stop)
        return torch.where(is_own, ids - self.start, 0), is_own

    def columns(self, ids: Tensor, elsewhere: int) -> Tensor:
        """Columns of ids; those of other ranks point to the one that is named."""
        columns, is_own = self.local(ids)
        return columns if is_own is None else torch.where(is_own, columns, elsewhere)

    def sum(self, *parts: Tensor) -> list[Tensor]:
        """The parts of all ranks, added in one message."""
        if self.alone or not parts:
            return list(parts)
        packed = torch.cat([part.reshape(-1) for part in parts])
        self.sum_(packed)
        sums = packed.split([part.numel() for part in parts])
        return [total.view(part.shape) for total, part in zip(sums, parts, strict=True)]

    def sum_(self, part: Tensor) -> None:
        """Add the other ranks' parts, in place."""
        if not self.alone and part.numel():
            dist.all_reduce(part, group=self.group)

    def max(self, part: Tensor) -> Tensor:
        """The largest of all ranks' numbers."""
        if self.alone:
            return part
        largest = part.clone()
        dist.all_reduce(largest, dist.ReduceOp.MAX, group=self.group)
        return largest

    def join(
        self,
        normalizers: Sequence[Tensor],
        *,
        entropies: Sequence[Tensor] = (),
        extra_sums: Sequence[Tensor] = (),
    ) -> Joined:
        """Log-sum-exps of this rank's columns become those of all: one MAX and one SUM.

        Args:
            normalizers: (C,) each.
            entropies: (C,) of this rank's columns alone, for the first of the normalisers.
            extra_sums: what else is to be summed.
        """
        if self.alone:
            return Joined(list(normalizers), list(entropies), list(extra_sums))
        if not normalizers:
            return Joined([], [], self.sum(*extra_sums))
        local = torch.stack(list(normalizers))
        # finite, so that columns without mass are nothing beside it
        anchor = self.max(local).clamp(min=torch.finfo(local.dtype).min)
        share = torch.exp(local - anchor)
        below = [
            torch.where(part == 0, 0, part * (entropy - gap))
            for part, entropy, gap in zip(share, entropies, local - anchor)
        ]
        total, *sums = self.sum(share, *below, *extra_sums)
        log_total, count = total.log(), len(below)
        joined = [
            weighted / mass + log for weighted, mass, log in zip(sums[:count], total, log_total)
        ]
        return Joined(list(anchor + log_total), joined, sums[count:])

    def top_k(self, top_k: Callable[[Tensor, int], Tensor], logits: Tensor, k: int) -> Tensor:
        """Ids (C, k) of the largest logits (C, W) of all ranks, equal logits by lowest id.

        Every rank sends its candidates, as many as it has.
        """
        if self.alone:
            return top_k(logits, k)
        counts = [min(k, size) for size in self.sizes]
        count, most = min(k, self.stop - self.start), max(counts)
        packed = logits.new_zeros((2, most, logits.shape[0]))
        if count:
            columns = top_k(logits, count)
            packed[0, :count] = logits.gather(1, columns).t()
            integer = torch.int32 if logits.dtype == torch.float32 else torch.int64
            ids = (columns + self.start).to(integer).t().contiguous()
            packed[1, :count] = ids.view(logits.dtype)
        ranks = [torch.empty_like(packed) for _ in counts]
        dist.all_gather(ranks, packed, group=self.group)
        found = torch.cat([theirs[:, :n] for theirs, n in zip(ranks, counts, strict=True)], 1)
        values, bits = found[0].t(), found[1].t().contiguous()
        integer = torch.int32 if logits.dtype == torch.float32 else torch.int64
        # ranks hold ascending ids, so of equal logits the first has the lowest
        order = values.sort(dim=-1, descending=True, stable=True).indices[:, :k]
        return bits.view(integer).gather(1, order).long()


WHOLE = VocabShard(None, 0)  # a vocabulary that is whole here
# heads that were found to be even, and the names of the groups; by the tensor and not by its rows,
# which another rank may not have seen as often: all ranks must come to ask the same times
_EVEN: MutableMapping[Tensor, set[str]] = WeakTensorKeyDictionary()


def check_even_shards(weight: Tensor, group: "dist.ProcessGroup") -> None:
    """Every rank has as many rows as this one; the ranks are asked once for each tensor."""
    if torch.compiler.is_compiling() or group.group_name in _EVEN.get(weight, ()):
        return
    mine = torch.tensor([weight.shape[0]], device=weight.device)
    found = [torch.empty_like(mine) for _ in range(group.size())]
    dist.all_gather(found, mine, group=group)
    counts = tuple(int(count) for count in found)
    if len(set(counts)) > 1:
        checks.fail(
            "head",
            "have as many rows on every rank of process_group",
            counts,
            f"pass LMHead(weight, shard_sizes={counts}) on every rank",
        )
    _EVEN.setdefault(weight, set()).add(group.group_name)
