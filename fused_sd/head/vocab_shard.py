"""A vocabulary that several ranks share: which columns are whose, and every message between ranks.

Each rank runs all tokens over its own columns of the head.  Only numbers that belong to a token are
sent: normalisers (one MAX, one SUM), logits at chosen entries (in the same SUM), sums over the
vocabulary, and the candidates of a top-k.  Every rank receives the same bits, so that all ranks
take the same decisions afterwards.  A whole vocabulary is the special case of one shard, which
sends nothing.

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
    """How the ranks of a process group share a vocabulary."""

    group: str  # its name
    rank: int
    sizes: tuple[int, ...]  # number of token ids of each rank, in rank order
    reduce_dhidden: bool


class Joined(NamedTuple):
    """Numbers over the vocabulary of all ranks."""

    normalizers: list[Tensor]  # (C,) log-sum-exps, fp64
    entropies: list[Tensor]  # (C,) nats
    extra_sums: list[Tensor]


class VocabShard:
    """This rank's columns of the vocabulary, and the messages to the other ranks."""

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
        """Columns of ids on this rank, and a mask of which ids are its own; None: all are."""
        if self.alone:
            return ids, None
        is_own = (ids >= self.start) & (ids < self.stop)
        return torch.where(is_own, ids - self.start, 0), is_own

    def columns(self, ids: Tensor, elsewhere: int) -> Tensor:
        """Columns of ids on this rank; ids of other ranks get the column ``elsewhere``."""
        columns, is_own = self.local(ids)
        return columns if is_own is None else torch.where(is_own, columns, elsewhere)

    def sum(self, *parts: Tensor) -> list[Tensor]:
        """Add the parts of all ranks, in one message."""
        if self.alone or not parts:
            return list(parts)
        packed = torch.cat([part.reshape(-1) for part in parts])
        self.sum_(packed)
        sums = packed.split([part.numel() for part in parts])
        return [total.view(part.shape) for total, part in zip(sums, parts, strict=True)]

    def sum_(self, part: Tensor) -> None:
        """Add the other ranks' parts to this one, in place."""
        if not self.alone and part.numel():
            dist.all_reduce(part, group=self.group)

    def max(self, part: Tensor) -> Tensor:
        """Elementwise maximum over all ranks."""
        if self.alone:
            return part
        largest = part.clone()
        dist.all_reduce(largest, dist.ReduceOp.MAX, group=self.group)
        return largest

    def join(
        self,
        normalizers: Sequence[Tensor],
        *,
        dtype: torch.dtype,
        entropies: Sequence[Tensor] = (),
        extra_sums: Sequence[Tensor] = (),
    ) -> Joined:
        """Combine log-sum-exps of each rank's columns into those of all: one MAX and one SUM.

        Args:
            normalizers: (C,) fp64 each.
            dtype: of the logits, and of what is sent.
            entropies: (C,) of this rank's columns, each for the normaliser at its place.
            extra_sums: other tensors to sum over the ranks, in the same message.
        """
        if self.alone:
            return Joined(list(normalizers), list(entropies), list(extra_sums))
        if not normalizers:
            return Joined([], [], self.sum(*extra_sums))
        local = torch.stack(list(normalizers))
        # finite, so that columns without mass contribute 0 and not NaN
        anchor = self.max(local.to(dtype)).clamp(min=torch.finfo(dtype).min)
        gaps = (local - anchor).to(dtype)
        share = torch.exp(gaps)
        below = [
            torch.where(part == 0, 0, part * (entropy - gap))
            for part, entropy, gap in zip(share, entropies, gaps)
        ]
        total, *sums = self.sum(share, *below, *extra_sums)
        log_total, count = total.log(), len(below)
        joined = [
            weighted / mass + log for weighted, mass, log in zip(sums[:count], total, log_total)
        ]
        return Joined(list(anchor.double() + log_total), joined, sums[count:])

    def top_k(self, top_k: Callable[[Tensor, int], Tensor], logits: Tensor, k: int) -> Tensor:
        """Ids (C, k) of the largest logits (C, W) of all ranks, equal logits by lowest id.

        Every rank sends its own k largest, or all it has where it has fewer.
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
        # ids ascend over the ranks, so a stable sort puts the lowest of equal logits first
        order = values.sort(dim=-1, descending=True, stable=True).indices[:, :k]
        return bits.view(integer).gather(1, order).long()


WHOLE = VocabShard(None, 0)  # a vocabulary that is not shared
# Heads whose even shards were checked, and the names of their groups.  Keyed by the tensor, because
# the check is an all-gather that all ranks must enter equally often: a key that two tensors share
# on one rank only, such as the number of rows, would let ranks wait for each other.
_EVEN: MutableMapping[Tensor, set[str]] = WeakTensorKeyDictionary()


def check_even_shards(weight: Tensor, group: "dist.ProcessGroup") -> None:
    """Check that all ranks hold equally many rows, with one all-gather for each tensor."""
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
