"""Which vocabulary entries are compared, and what becomes of the remainder.

A truncated support turns a row of logits into K (or K + 1) bucket log-probabilities, and the
gradient by the buckets back into a gradient by the logits: a constant times a softmax over the
whole row, with the K entries of the support overwritten.  Everything here is (rows, K); the passes
over the vocabulary are in ``rows.py``.

Dimension key:  C rows in a chunk, K entries of the support
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from fused_sd import checks
from fused_sd.terms.divergence import DivergenceTerm

BLOCK = 128  # columns that top_k compares by their maximum
Remainder = Literal["tail", "renormalize", "drop", "teacher_renormalize"]


@dataclass(frozen=True)
class FullVocabulary:
    """Every entry is compared; there is no remainder."""


@dataclass(frozen=True)
class StudentTopK:
    """The student's k most likely entries (SDPO).  The choice is not differentiated."""

    k: int

    def __post_init__(self) -> None:
        checks.check_positive_int("k", self.k)


@dataclass(frozen=True)
class TeacherTopK:
    """The teacher's k most likely entries (SD-Zero's and OPSD's code)."""

    k: int

    def __post_init__(self) -> None:
        checks.check_positive_int("k", self.k)


@dataclass(frozen=True)
class UnionTopK:
    """The k most likely entries of either side, each counted once: between k and 2k entries."""

    k: int

    def __post_init__(self) -> None:
        checks.check_positive_int("k", self.k)


@dataclass(frozen=True, eq=False)
class TokenIds:
    """Given entries.

    Args:
        ids: (..., K) int64, one set for each token.  A repeated id counts once; a negative id is
            padding and counts not at all.
    """

    ids: Tensor


FULL_VOCABULARY = FullVocabulary()
Support = FullVocabulary | StudentTopK | TeacherTopK | UnionTopK | TokenIds


class Buckets(NamedTuple):
    """The two sides over the compared entries, and how to return from there."""

    log_s: Tensor  # (C, K) or (C, K + 1) with the tail bucket last
    log_t: Tensor  # as log_s
    background: Tensor | None  # (C,) log-normaliser of the student's entries outside; None: no mass
    balanced: bool  # both sides sum to 1


def first_occurrence(ids: Tensor) -> Tensor:
    """Whether each id (C, K) is not negative and does not stand further left in its row."""
    ordered, order = ids.sort(dim=-1, stable=True)
    is_first = torch.ones_like(ids, dtype=torch.bool)
    is_first[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    return torch.zeros_like(is_first).scatter_(1, order, is_first) & (ids >= 0)


def log_complement(log_probs: Tensor, floor: float) -> Tensor:
    """Log-mass outside the entries (C, K), where all that is known of the rest is that it sums to
    1.

    The mass inside is kept below ``exp(-floor)``, as SDPO's official code does with 1e-7.
    """
    log_mass = log_probs.logsumexp(-1, keepdim=True).clamp(max=-floor)
    return torch.log(-torch.expm1(log_mass))


def bucket_terms(
    buckets: Buckets, term: DivergenceTerm, remainder: str, entry_clip: float | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Terms and their derivatives over the buckets, and which entries the entry clip cut.

    Returns:
        term: (C, K') each bucket's contribution.
        dlog_s: (C, K') its derivative by the student's bucket log-probability.
        clipped: (C, K') bool.
    """
    log_s, log_t = buckets.log_s, buckets.log_t
    if remainder == "teacher_renormalize":
        t = log_t.exp()
        value, dlog_s = (
            torch.where(t == 0, t, -t * log_s),
            -t,
        )  # a cross entropy: no teacher entropy
    elif not buckets.balanced:
        value, dlog_s = term.plain(log_s, log_t)
    elif entry_clip is None:
        value, dlog_s = term.function(log_s, log_t, term.parameter)
    else:
        return term.clipped(log_s, log_t, entry_clip)
    if entry_clip is None:
        return value, dlog_s, torch.zeros_like(value, dtype=torch.bool)
    clipped = value > entry_clip
    return value.clamp(max=entry_clip), dlog_s.masked_fill(clipped, 0), clipped


def tail_gradient_to_entries(dlog_s: Tensor, log_s: Tensor, floor: float) -> Tensor:
    """Hand the derivative by a floored tail (last column) to the entries that define it: (C, K).

    The floored tail is a function of the entries' mass, flat where the mass meets the floor.
    """
    inside = log_s[:, :-1]
    open_tail = inside.logsumexp(-1, keepdim=True) < -floor
    pull = torch.where(open_tail, dlog_s[:, -1:] * torch.exp(-log_s[:, -1:]), 0)
    return dlog_s[:, :-1] - pull * inside.exp()


def has_short_list(k: int, num_columns: int) -> bool:
    """Whether the blocks that may hold the k largest are few beside the row."""
    return 4 * k * BLOCK < num_columns


def overlap(ids: Tensor, other: Tensor) -> Tensor:
    """Share of the distinct ids (C, K) that are among the others (C, K): (C,)."""
    ordered = other.sort(dim=-1).values
    at = torch.searchsorted(ordered, ids).clamp(max=ordered.shape[-1] - 1)
    return (ordered.gather(1, at) == ids).float().mean(-1)
