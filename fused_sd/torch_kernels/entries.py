"""Chosen entries of rows of logits: taken out of their rows, and compared.

``kernels/entries.py`` is the twin for a GPU, with the same names, arguments and results.

Dimension key:  C rows in a chunk, W columns, K chosen entries of a row
"""

import torch
from torch import Tensor

from fused_sd.terms.buckets import (
    Buckets,
    EntryTerms,
    bucket_terms,
    entry_terms,
    renormalized,
    with_tail,
)
from fused_sd.terms.divergence_term import DivergenceTerm
from fused_sd.torch_kernels.rows import log_normalizer


def take_out_(logits: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
    """Read a row's entries, and make them -inf.

    Args:
        logits: (C, W), written at the columns.
        columns: (C, K) int64 in [0, W).

    Returns:
        entries: (C, K) logits.
        rest: (C,) fp64, log-sum-exp of the row without them.
    """
    entries = logits.gather(1, columns)
    logits.scatter_(1, columns, -torch.inf)
    return entries, log_normalizer(logits)


def compare_entries(
    student: Tensor,
    teacher: Tensor,
    rests: tuple[Tensor, Tensor] | None,
    term: DivergenceTerm,
    entry_clip: float | None,
) -> EntryTerms:
    """A divergence over K entries of each row and, where rests are given, a bucket for others.

    Args:
        student, teacher: (C, K) logits, -inf on both sides where there is no entry.
        rests: (C,) fp64, log-sum-exps of the sides' other logits; None: entries are renormalised.
        term: the divergence.
        entry_clip: upper bound of each bucket's term; None: no bound.
    """
    lses = None
    if rests is None:
        buckets = Buckets(renormalized(student), renormalized(teacher), None, True)
    else:
        log_s, lse_s = with_tail(student, rests[0])
        log_t, lse_t = with_tail(teacher, rests[1])
        lses = lse_s, lse_t
        background = torch.where(rests[0] == -torch.inf, 0, rests[0])
        buckets = Buckets(log_s, log_t, background, True)
    found = bucket_terms(buckets, term, "tail", entry_clip)
    return entry_terms(buckets, found, student.shape[-1], lses)
