"""What ranks that share a head send each other: fp32 numbers a token, and bytes of a step.

The collectives are those of ``head/vocab_shard.py``: a few for each chunk, and one that sums the
gradient w.r.t. the hidden states.  Metrics, importance caps and token clips add a few numbers a
token; a plan does not know of them and leaves them out.

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
# how many sides need their normaliser, by the remainder; all sides if it is not listed
_NORMALIZED = {"renormalize": 0, "teacher_renormalize": 1}


class Wire(NamedTuple):
    """fp32 numbers that a rank sends for each token, and the number of collectives a chunk."""

    max_numbers: int
    sum_numbers: int
    gathered_numbers: int  # this rank's part
    dhidden_numbers: int  # once, in one collective over all tokens
    maxes: int  # collectives of each kind, a chunk
    sums: int
    gathers: int


def wire(
    objective: PlannedObjective,
    hidden_size: int,
    shard_vocab: int,
    kind: str,
    has_gradient: bool = True,
) -> Wire:
    """Count what one chunked run sends.

    Args:
        objective: the loss.
        hidden_size: D.
        shard_vocab: V of the largest shard.
        kind: "cuda" or "cpu".  On a GPU the kernels send the sum that a KL's gradient needs
            together with the normalisers.
        has_gradient: whether the run computes gradients.
    """
    sides = 1 + objective.has_teacher
    normalized, extra_sums, more, gathers = sides, 0, 0, 0
    gathered = choosing = 0
    comparison, support = objective.comparison, objective.truncated
    if comparison is None:
        extra_sums = sides  # the sampled token's logit
    elif support is None:
        has_clip, has_total = comparison.entry_clip is not None, has_gradient
        if kind == "cuda":
            extra_sums = 1
            known = comparison.term.share_of_mean_ratio is not None
            has_total = has_gradient and (has_clip or not known)
        # the loss, the number of clipped entries, and the sum that the gradient needs
        more = 1 + has_clip + has_total
    else:
        normalized = _NORMALIZED.get(comparison.remainder, sides)
        extra_sums = sides * support.num_entries
        gathers = chunked.choosing_sides(objective)
        gathered = gathers * 2 * min(support.top_k, shard_vocab)  # logits and ids
        choosing = support.num_normalizers  # with the logits at the entries
    return Wire(
        max_numbers=normalized + choosing,
        sum_numbers=normalized + extra_sums + more + choosing * (1 + chunked.compared(objective)),
        gathered_numbers=gathered,
        dhidden_numbers=hidden_size,
        maxes=(1 if normalized else 0) + choosing,
        sums=(2 if more else 1) + choosing,
        gathers=gathers,
    )


@dataclass(frozen=True)
class Traffic:
    """What every rank passes to the collectives of forward and backward.

    Attributes:
        payload: bytes passed to collectives, by the collective's name.
        sent: bytes that a rank sends around a ring, by the same names: 2 (ranks - 1) / ranks times
            a reduction's payload, (ranks - 1) times a gather's.
        num_collectives: number of collectives.
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
    """Traffic of one step, with dhidden summed over the ranks; None: no ranks share a head."""
    ranks = work.tensor_parallel
    if ranks == 1:
        return None
    vocab = max(work.vocab, work.teacher_vocab if work.objective.has_teacher else 0)
    payload, count = dict.fromkeys((MAX, SUM, GATHER, SUM_OF_DHIDDEN), 0), 1
    of_dhidden = work.active
    if work.kept is not None:
        runs = certified.runs(work)
        groups = -(-work.active // runs[0].layout.group)
        payload[MAX], count = work.active, 1 + groups  # a byte a token: whether its row is dense
        of_dhidden = work.tokens
    else:
        runs = fused.runs(work)
        if num_entries(work.objective):
            of_dhidden = work.tokens
    for each in runs:
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
