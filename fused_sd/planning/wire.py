"""What ranks that share a head tell each other: fp32 numbers of a token, and the bytes of a step.

The collectives are those of ``vocab_shard.py``: a few for each chunk, and one for the gradient of
all hidden states.  Metrics, importance caps and token clips, which a plan does not know, send a few
numbers more.

Dimension key:  N tokens, A tokens with a weight, D hidden size, V vocabulary, K entries of the
                support
"""

from dataclasses import dataclass
from typing import NamedTuple

from fused_sd.planning import certified, chunked, fused
from fused_sd.planning.chunked import WIDE, num_entries
from fused_sd.planning.objectives import PlannedObjective
from fused_sd.planning.workload import Workload

MAX, SUM, GATHER, SUM_OF_DHIDDEN = "MAX", "SUM", "all-gather", "SUM of dH"
_NORMALIZED = {"renormalize": 0, "teacher_renormalize": 1}  # sides, by the remainder; else all


class Wire(NamedTuple):
    """fp32 numbers of a token that a rank hands over, and in how many collectives of a chunk."""

    max_numbers: int
    sum_numbers: int
    gathered_numbers: int  # of this rank; those of all arrive
    dhidden_numbers: int  # in one collective of all tokens, once
    maxes: int
    sums: int
    gathers: int


def wire(
    objective: PlannedObjective,
    hidden_size: int,
    shard_vocab: int,
    kind: str,
    has_gradient: bool = True,
) -> Wire:
    """What one walk sends.

    Args:
        objective: the loss.
        hidden_size: D.
        shard_vocab: V of the largest shard.
        kind: "cuda" or "cpu": the kernels learn the sum that a KL's gradient needs with the
            normalisers.
        has_gradient: whether the walk forms gradients.
    """
    sides = 1 + objective.has_teacher
    normalized, extra_sums, more, gathers = sides, 0, 0, 0
    if not objective.is_divergence:
        extra_sums = sides  # the sampled token's logits
    elif objective.support == "full":
        more = 3  # the loss, the clipped entries, and the sum that the gradient needs
        if kind == "cuda":
            extra_sums = 1
            known = objective.divergence != "jsd" and not objective.entry_clip
            more = 1 if has_gradient and known else 3
    else:
        normalized = _NORMALIZED.get(objective.remainder, sides)
        extra_sums = sides * chunked.compared(objective)
        gathers = chunked.choosing_sides(objective)
    return Wire(
        max_numbers=normalized,
        sum_numbers=normalized + extra_sums + more,
        gathered_numbers=gathers * 2 * min(objective.k, shard_vocab),  # logits and ids
        dhidden_numbers=hidden_size,
        maxes=1 if normalized else 0,
        sums=2 if more else 1,
        gathers=gathers,
    )


@dataclass(frozen=True)
class Traffic:
    """What every rank hands to the collectives of forward and backward.

    Attributes:
        payload: bytes handed over, by the collective's name.
        sent: bytes that a rank sends around a ring, by the same names: 2 (ranks - 1) / ranks of
            what is reduced, (ranks - 1) times what is gathered.
        num_collectives: how many they are.
    """

    payload: dict[str, int]
    sent: dict[str, int]
    num_collectives: int

    @property
    def payload_bytes(self) -> int:
        return sum(self.payload.values())

    @property
    def sent_bytes(self) -> int:
        return sum(self.sent.values())


def traffic(work: Workload) -> Traffic | None:
    """Of a rank's step, its hidden states' gradient reduced; None: no rank shares the head."""
    ranks = work.tensor_parallel
    if ranks == 1:
        return None
    vocab = max(work.vocab, work.teacher_vocab if work.objective.has_teacher else 0)
    payload, count = dict.fromkeys((MAX, SUM, GATHER, SUM_OF_DHIDDEN), 0), 1
    of_dhidden = work.active
    if work.kept is not None:
        walked = certified.walked(work)
        groups = -(-work.active // walked[0].layout.group)
        payload[MAX], count = work.active, 1 + groups  # a byte of each: whether it is dense
        of_dhidden = work.tokens
    else:
        walked = fused.walked(work)
        if num_entries(work.objective):
            of_dhidden = work.tokens
    for each in walked:
        sends = wire(work.objective, work.hidden_size, vocab, work.kind, each.has_gradient)
        payload[MAX] += WIDE * each.tokens * sends.max_numbers
        payload[SUM] += WIDE * each.tokens * sends.sum_numbers
        payload[GATHER] += WIDE * each.tokens * sends.gathered_numbers
        chunks = -(-each.tokens // each.layout.chunk)
        count += chunks * (sends.maxes + sends.sums + sends.gathers)
    payload[SUM_OF_DHIDDEN] = WIDE * of_dhidden * work.hidden_size
    sent = {
        name: size * (ranks - 1) if name == GATHER else 2 * size * (ranks - 1) // ranks
        for name, size in payload.items()
    }
    return Traffic(payload, sent, count)
