"""The arithmetic of a truncated row: a few entries and perhaps one bucket for all others.

A truncated support turns a row of logits into K or K + 1 bucket log-probabilities.  The gradient
w.r.t. those becomes a gradient w.r.t. the whole row again: a constant times the row's softmax, with
the K entries of the support written over it.  Everything here has a few columns; the passes over
the vocabulary are in the kernels.

Dimension key:  C rows in a chunk, K entries of the support
"""

from typing import NamedTuple

import torch
from torch import Tensor

from fused_sd.terms.divergence_term import DivergenceTerm


class Buckets(NamedTuple):
    """Both sides' log-probabilities over what is compared, and the way back to a whole row."""

    log_s: Tensor  # (C, K), or (C, K + 1) with the tail bucket last
    log_t: Tensor  # as log_s
    background: Tensor | None  # (C,) fp64 normaliser of the entries outside; None: no mass there
    balanced: bool  # whether both sides sum to 1


class BucketTerms(NamedTuple):
    """What a divergence makes of the buckets, each (C, K) or (C, K + 1)."""

    term: Tensor  # contribution of each bucket to the token's loss
    dlog_s: Tensor  # its derivative w.r.t. the student's bucket log-probability
    clipped: Tensor | None  # bool, which contributions the entry clip cut; None: there is no clip


class EntryTerms(NamedTuple):
    """The loss of a truncated row, and its gradient w.r.t. the row's logits."""

    loss: Tensor  # (C,)
    clipped: Tensor | None  # (C,) number of buckets that the entry clip cut; None: there is no clip
    inside: Tensor  # (C, K) gradient at the entries
    outside: Tensor | None  # (C,) factor of exp(logit - background) elsewhere; None: it is 0 there
    background: Tensor | None  # (C,) fp64
    lses: tuple[Tensor, Tensor] | None  # (C,) fp64 of both sides' whole rows, where they were found


def bucket_terms(
    buckets: Buckets, term: DivergenceTerm, remainder: str, entry_clip: float | None
) -> BucketTerms:
    """Evaluate a divergence on the buckets."""
    log_s, log_t = buckets.log_s, buckets.log_t
    if remainder == "teacher_renormalize":  # a cross entropy, without the teacher's entropy
        t = log_t.exp()
        value, dlog_s = torch.where(t == 0, t, -t * log_s), -t
    elif not buckets.balanced:
        value, dlog_s = term.plain(log_s, log_t)
    elif entry_clip is None:
        value, dlog_s = term.function(log_s, log_t, term.parameter)
    else:
        return BucketTerms(*term.clipped(log_s, log_t, entry_clip))
    if entry_clip is None:
        return BucketTerms(value, dlog_s, None)
    clipped = value > entry_clip
    return BucketTerms(value.clamp(max=entry_clip), dlog_s.masked_fill(clipped, 0), clipped)


def entry_terms(
    buckets: Buckets, found: BucketTerms, k: int, lses: tuple[Tensor, Tensor] | None = None
) -> EntryTerms:
    """Turn a gradient w.r.t. the buckets of K entries into one w.r.t. the logits of a row."""
    total = found.dlog_s.sum(-1, keepdim=True)
    dlogits = found.dlog_s - buckets.log_s.exp() * total
    outside = None
    if buckets.background is not None:
        outside = dlogits[:, k] if dlogits.shape[-1] > k else -total[:, 0]
    clipped = None if found.clipped is None else found.clipped.sum(-1)
    inside = dlogits[:, :k]
    return EntryTerms(found.term.sum(-1), clipped, inside, outside, buckets.background, lses)


def renormalized(entries: Tensor) -> Tensor:
    """Log-probabilities (C, K) over the entries alone; -inf in a row that has none."""
    return torch.where(entries == -torch.inf, entries, entries.log_softmax(-1))


def with_tail(entries: Tensor, rest: Tensor) -> tuple[Tensor, Tensor]:
    """Append a tail bucket and normalise.

    Args:
        entries: (C, K) logits.
        rest: (C,) fp64, log-sum-exp of the row's other logits.

    Returns:
        log_probs: (C, K + 1), the tail last, in the entries' dtype.
        lse: (C,) fp64, log-sum-exp of the whole row.
    """
    buckets = torch.cat([entries.double(), rest[:, None]], -1)
    lse = buckets.logsumexp(-1)
    return (buckets - lse[:, None]).to(entries.dtype), lse


def served_tail(log_probs: Tensor, has_others: Tensor) -> Tensor:
    """Log-mass (C,) that a server's log-probabilities leave to the entries that it did not send.

    Rounded probabilities may sum to 1 or more whatever was left out.  Each log-probability is known
    to eps of itself in the dtype that was sent, and the server's softmax to eps of fp32, so the sum
    is known to ``eps(fp32) + eps(sent) * sum(p |log p|)``.  A smaller tail cannot be told from
    none, and is taken to be that large: an empty one would make a KL from the student infinite.

    Args:
        log_probs: (C, K) in the dtype that was sent; -inf where there is no entry.
        has_others: (C,) bool, whether the student has mass on other entries.  Where it has none
            the vocabulary has no others, and a tail that cannot be told from none is none.

    Returns:
        fp64 log-masses.
    """
    exact = log_probs.double()
    of_softmax, of_sent = (
        torch.finfo(dtype).eps
        for dtype in (torch.promote_types(log_probs.dtype, torch.float32), log_probs.dtype)
    )
    smallest = of_softmax + of_sent * torch.special.entr(exact.exp()).sum(-1).clamp(min=0)
    tail = -torch.expm1(exact.logsumexp(-1))
    rounded = torch.where(has_others, smallest, 0)
    return torch.where(tail < smallest, rounded, tail).log()


def log_complement(log_probs: Tensor, floor: float) -> Tensor:
    """Log-mass (C, 1) outside entries (C, K) of which only their log-probabilities are known.

    The mass inside is kept below ``exp(-floor)``, as SDPO's official code does with 1e-7.
    """
    log_mass = log_probs.logsumexp(-1, keepdim=True).clamp(max=-floor)
    return torch.log(-torch.expm1(log_mass))


def tail_gradient_to_entries(dlog_s: Tensor, log_s: Tensor, floor: float) -> Tensor:
    """Add the derivative w.r.t. a floored tail (last column) to the entries that define it: (C, K).

    The floored tail is a function of the entries' mass, and constant where the floor holds it.
    """
    inside = log_s[:, :-1]
    open_tail = inside.logsumexp(-1, keepdim=True) < -floor
    pull = torch.where(open_tail, dlog_s[:, -1:] * torch.exp(-log_s[:, -1:]), 0)
    return dlog_s[:, :-1] - pull * inside.exp()
