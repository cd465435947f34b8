"""Row functions in PyTorch: what is done to a chunk of logits between the GEMMs.

The twin of ``kernels/rows.py``: same names, same arguments, same results.  Rows are (C, V) logits
in fp32 or fp64; a column of -inf has no mass.  A trailing underscore says that the logits are
spent.

Dimension key:  C rows in a chunk, V vocabulary (with padding columns of -inf), K support size
Symbols:        lse_s, lse_t log-sum-exp of the student's and the teacher's rows
"""

from collections.abc import Collection

import torch
from torch import Tensor

from fused_sd.chunking import gradient_view
from fused_sd.divergence import DivergenceTerm
from fused_sd.support import BLOCK

# both KLs, the JSD with its beta, and both entropies, over the full vocabulary
SUMMARY_PARAMETERS = {"forward_kl": 0.0, "reverse_kl": 0.0, "jsd": 0.5}
SUMMARY = (*SUMMARY_PARAMETERS, "student_entropy", "teacher_entropy")


def log_normalizer(logits: Tensor) -> Tensor:
    """Log-sum-exp of each row: (C,)."""
    return logits.logsumexp(-1)


def entropy(logits: Tensor, lse: Tensor) -> Tensor:
    """Entropy of each row in nats: (C,)."""
    return torch.special.entr(torch.exp(logits - lse[:, None])).sum(-1)


def divergence(
    student: Tensor,  # (C, V)
    teacher: Tensor,  # (C, V)
    lse_s: Tensor,  # (C,)
    lse_t: Tensor,  # (C,)
    term: DivergenceTerm,
    entry_clip: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Sum of a divergence's terms over the vocabulary.

    Returns:
        loss: (C,) sum of the terms.
        total: (C,) sum of their derivatives by the student's log-probabilities.
        clipped: (C,) number of entries that the entry clip cut.
    """
    value, dlog_s, clipped = _terms(student, teacher, lse_s, lse_t, term, entry_clip)
    return value.sum(-1), dlog_s.sum(-1), clipped


def divergence_gradient_(
    student: Tensor,  # (C, V), spent
    teacher: Tensor,  # (C, V)
    lse_s: Tensor,  # (C,)
    lse_t: Tensor,  # (C,)
    term: DivergenceTerm,
    entry_clip: float | None,
    total: Tensor,  # (C,), of divergence()
    upstream: Tensor,  # (C,)
    cap: float | None,
    dtype: torch.dtype,
) -> Tensor:
    """Gradient of ``sum(upstream * loss)`` by the logits before the soft-cap: (C, V)."""
    _, dlog_s, _ = _terms(student, teacher, lse_s, lse_t, term, entry_clip)
    s = torch.exp(student - lse_s[:, None])
    dlogits = dlog_s.sub_(s.mul_(total[:, None])).mul_(upstream[:, None])
    dlogits.masked_fill_(upstream[:, None] == 0, 0)  # a token that is cut may be infinite
    return _into(student, dlogits, cap, dtype)


def softmax_gradient_(
    logits: Tensor,  # (C, V), spent
    normalizer: Tensor,  # (C,)
    constant: Tensor,  # (C,)
    slope: Tensor | None,  # (C,)
    cap: float | None,
    dtype: torch.dtype,
) -> Tensor:
    """``exp(x) * (constant + slope * x)`` with ``x = logits - normalizer``: (C, V) of ``dtype``."""
    shifted = logits - normalizer[:, None]
    share = shifted.exp()
    factor = constant[:, None]
    if slope is not None:
        factor = factor + slope[:, None] * shifted.masked_fill_(share == 0, 0)
    return _into(logits, share.mul_(factor), cap, dtype)


def summary(
    student: Tensor, teacher: Tensor, lse_s: Tensor, lse_t: Tensor, names: Collection[str]
) -> dict[str, Tensor]:
    """What a row of both sides says: those of ``SUMMARY`` that are named, each (C,)."""
    observed = {}
    for name in names:
        if name in SUMMARY_PARAMETERS:
            term = DivergenceTerm(name, SUMMARY_PARAMETERS[name], 0.0)
            observed[name] = divergence(student, teacher, lse_s, lse_t, term, None)[0]
    for name, side, lse in (("student", student, lse_s), ("teacher", teacher, lse_t)):
        if f"{name}_entropy" in names:
            observed[f"{name}_entropy"] = entropy(side, lse)
    return observed


def block_maxima(logits: Tensor) -> Tensor:
    """The largest logit of every ``BLOCK`` columns: (C, ceil(V / BLOCK))."""
    num_columns = logits.shape[1]
    whole = num_columns // BLOCK * BLOCK
    blocks = logits[:, :whole].unflatten(1, (whole // BLOCK, BLOCK)).amax(-1)
    if whole == num_columns:
        return blocks
    return torch.cat([blocks, logits[:, whole:].amax(-1, keepdim=True)], 1)


def _terms(
    student: Tensor,
    teacher: Tensor,
    lse_s: Tensor,
    lse_t: Tensor,
    term: DivergenceTerm,
    entry_clip: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    log_s, log_t = student - lse_s[:, None], teacher - lse_t[:, None]
    if entry_clip is None:
        value, dlog_s = term.function(log_s, log_t, term.parameter)
        return value, dlog_s, torch.zeros_like(lse_s)
    value, dlog_s, clipped = term.clipped(log_s, log_t, entry_clip)
    return value, dlog_s, clipped.sum(-1).to(lse_s)


def _into(logits: Tensor, dlogits: Tensor, cap: float | None, dtype: torch.dtype) -> Tensor:
    """Write the gradient over the logits it came from, through the soft-cap's derivative."""
    if cap is not None:
        dlogits = dlogits.mul_(1 - (logits / cap).square_()).masked_fill_(logits == -torch.inf, 0)
    return gradient_view(logits, dtype).copy_(dlogits)
