"""Functions on whole rows of logits, in PyTorch: normalisers, divergences, gradients, metrics.

This is the last stop of a loss on a CPU: an objective calls these functions on a chunk's logits.
``kernels/rows.py`` is the twin for a GPU, with the same names, arguments and results.  Rows are
(C, W) logits in fp32 or fp64; a column of -inf has no mass.  A trailing underscore says that the
gradient may be written over the logits.

A block of a few rows is processed at a time, in memory that the next block reuses, so that all of
it stays in the CPU's caches.  Blocks whose log-ratios are moderate take the in-place forms of
``near.py``, which select nothing by a mask, because a mask costs as much as ten multiplications;
other blocks take the general functions of ``terms/divergence.py``, where the formulas are.

Where ranks share the vocabulary, a function of two sides returns numbers over all ranks' columns, a
function of one side numbers over this rank's columns.

Dimension key:  C rows in a chunk, R rows of a block, W columns
"""

from collections.abc import Collection, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fused_sd.head.vocab_shard import WHOLE, VocabShard
from fused_sd.terms.divergence_term import DivergenceTerm
from fused_sd.torch_kernels.near import FORMS, Block, clip_
from fused_sd.torch_kernels.slices import slices

READS_PADDING = False  # a column that is -inf on both sides has a log-ratio of NaN
ROW_BLOCK_LOGITS = 2**19  # logits of a block; in smaller ones threads wait more often
FLOOR = -1e4  # lower bound of log-probabilities that multiply a probability of 0: 0 * -inf is NaN
# metrics over the full vocabulary: divergences with their parameters, then both entropies
ROW_METRIC_PARAMETERS = {"forward_kl": 0.0, "reverse_kl": 0.0, "jsd": 0.5}
ROW_METRICS = (*ROW_METRIC_PARAMETERS, "student_entropy", "teacher_entropy")


class RowGradient(NamedTuple):
    """Where and how a divergence writes its gradient of ``sum(row_weights * loss)``."""

    row_weights: Tensor  # (C,) factors of the rows' gradients
    cap: float | None  # soft-cap of the student's logits; the gradient is w.r.t. those before it
    out: Tensor  # (C, >= W); may be the student's logits


class EntryGradient(NamedTuple):
    """The gradient w.r.t. chosen logits of each row, where it is not that of the other columns."""

    columns: Tensor  # (C, K) int64
    logits: Tensor  # (C, K) at the columns
    values: Tensor  # (C, K), before the weights and the soft-cap's derivative
    row_weights: Tensor | None  # (C,) factors of the row's whole gradient; None: ones

    def weighted(self, cap: float | None) -> Tensor:
        """The values (C, K) times the weights and the derivative of a soft-cap."""
        values = self.values
        if self.row_weights is not None:
            values = _weighted(values, self.row_weights[:, None])
        if cap is not None:
            slope = 1 - (self.logits / cap).square()
            values = torch.where(values == 0, 0, values * slope)
        return values


class Compared(NamedTuple):
    """What a comparison of both sides' rows finds."""

    loss: Tensor  # (C,) sum of the divergence's terms
    clipped: Tensor | None  # (C,) number of entries that the entry clip cut; None: there is no clip
    metrics: dict[str, Tensor]  # the named ones of ROW_METRICS, each (C,)


class Normalizers(NamedTuple):
    """Log-sum-exps of a chunk's rows on both sides."""

    student: Tensor  # (C,)
    teacher: Tensor  # (C,)
    state: Any  # what the backend keeps beside them for its other functions
    shard: VocabShard  # which columns the rows have, where ranks share the vocabulary


def log_normalizer(logits: Tensor) -> Tensor:
    """Log-sum-exp of each row: (C,)."""
    lse = logits.new_empty(logits.shape[0])
    for at in _row_blocks(logits):
        torch.logsumexp(logits[at], -1, out=lse[at])
    return lse


def lse_and_entropy(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Log-sum-exp of each row and its entropy in nats: (C,) each."""
    lse = log_normalizer(logits)
    return lse, _entropy(logits, lse)


def _entropy(logits: Tensor, normalizer: Tensor) -> Tensor:
    """Part of these columns in the entropy of rows with given log-sum-exps: (C,)."""
    entropy = torch.empty_like(normalizer)
    for at, log_probs, spare in _row_blocks(logits, 2):
        torch.sub(logits[at], normalizer[at, None], out=log_probs)
        torch.exp(log_probs, out=spare)
        torch.sum(spare.mul_(log_probs.clamp_(min=FLOOR)), -1, out=entropy[at])
    return entropy.neg_()


def normalizers(student: Tensor, teacher: Tensor, shard: VocabShard = WHOLE) -> Normalizers:
    """Log-sum-exps of both sides' rows."""
    lses = shard.join([log_normalizer(student), log_normalizer(teacher)]).normalizers
    return Normalizers(lses[0], lses[1], None, shard)


def known_normalizers(student: Tensor, teacher: Tensor, shard: VocabShard = WHOLE) -> Normalizers:
    """Normalisers of which the log-sum-exps (C,) are known, for ``row_metrics`` alone."""
    return Normalizers(student, teacher, None, shard)


def divergence_(
    student: Tensor,  # (C, W)
    teacher: Tensor,  # (C, W)
    normalizers: Normalizers,
    term: DivergenceTerm,
    entry_clip: float | None,
    gradient: RowGradient | None,
    names: Collection[str] = (),
) -> Compared:
    """Sum a divergence's terms over the vocabulary and, where asked for, write the gradient.

    Args:
        student, teacher: logits of both sides.
        normalizers: their log-sum-exps, by ``normalizers``.
        term: the divergence.
        entry_clip: upper bound of each entry's term; None: no bound.
        gradient: where and how the gradient is written; None: no gradient.
        names: metrics of ``ROW_METRICS`` to find beside the loss.
    """
    given = student, teacher, normalizers, term, entry_clip
    metrics = {}
    if names:
        metrics = row_metrics(student, teacher, normalizers, names)
    shard = normalizers.shard
    if shard.alone:
        loss, clipped, _ = _compare(*given, None, gradient)
    else:
        loss, clipped, total = shard.sum(*_compare(*given, None, None))
        if gradient is not None:
            _compare(*given, total, gradient)
    return Compared(loss, None if entry_clip is None else clipped, metrics)


def _compare(
    student: Tensor,
    teacher: Tensor,
    normalizers: Normalizers,
    term: DivergenceTerm,
    entry_clip: float | None,
    known_total: Tensor | None,  # (C,) sum of dlog_s over all ranks; None: these are all columns
    gradient: RowGradient | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """As ``divergence_``, over these columns alone; and the sum of ``dlog_s`` over them."""
    loss, total = torch.empty_like(normalizers.student), torch.empty_like(normalizers.student)
    clipped = torch.zeros_like(loss)
    lse_s, lse_t, form = normalizers.student, normalizers.teacher, FORMS.get(term.name)
    for at, *buffers in _row_blocks(student, len(Block._fields)):
        block = Block(*buffers)
        is_near = block.fill_(student[at], teacher[at], lse_s[at], lse_t[at], form is not None)
        if is_near and form is not None:
            value, dlog_s = form.evaluate(block, term.parameter)
            if entry_clip is not None:
                value, dlog_s, clipped[at] = clip_(block, value, dlog_s, term.balance, entry_clip)
            s = block.s
        else:
            value, dlog_s, cut = _terms(block.s, block.t, term, entry_clip)
            clipped[at] = cut.sum(-1).to(loss)
            s = block.s.exp_()
        torch.sum(value, -1, out=loss[at])
        torch.sum(dlog_s, -1, out=total[at])
        if gradient is not None:
            row_weights, cap, out = gradient
            whole = total if known_total is None else known_total
            dlogits = dlog_s.sub_(s.mul_(whole[at, None]))
            if not is_near:  # a row of weight 0 may hold infinite terms, and 0 * inf is NaN
                dlogits.masked_fill_(row_weights[at, None] == 0, 0)
            _write(dlogits, row_weights[at], student[at], cap, out[at])
    return loss, clipped, total


def softmax_gradient_(
    logits: Tensor,  # (C, W)
    normalizer: Tensor,  # (C,)
    constant: Tensor,  # (C,)
    slope: Tensor | None,  # (C,)
    cap: float | None,
    out: Tensor,  # (C, W); may be the logits
    entries: EntryGradient | None = None,
) -> None:
    """``out = exp(x) * (constant + slope * x)`` with ``x = logits - normalizer``.

    The entries have values of their own, and their weights multiply the constant too, where there
    is no slope.
    """
    if entries is not None and entries.row_weights is not None:
        assert slope is None
        constant = _weighted(constant, entries.row_weights)
    for at, shifted, share in _row_blocks(logits, 2):
        torch.sub(logits[at], normalizer[at, None], out=shifted)
        torch.exp(shifted, out=share)
        if slope is not None:
            factor = shifted.clamp_(min=FLOOR).mul_(slope[at, None]).add_(constant[at, None])
            _write(share.mul_(factor), None, logits[at], cap, out[at])
        else:
            _write(share, constant[at], logits[at], cap, out[at])
    if entries is not None:
        out.scatter_(1, entries.columns, entries.weighted(cap).to(out.dtype))


def row_metrics(
    student: Tensor,
    teacher: Tensor,
    normalizers: Normalizers,
    names: Collection[str],
) -> dict[str, Tensor]:
    """Metrics over the full vocabulary: those of ``ROW_METRICS`` that are named, each (C,)."""
    parts = {}
    for name, parameter in ROW_METRIC_PARAMETERS.items():
        if name in names:
            term = DivergenceTerm(name, parameter)
            pair = student, teacher, normalizers
            parts[name] = _compare(*pair, term, None, None, None)[0]
    for name, side, lse in (
        ("student_entropy", student, normalizers.student),
        ("teacher_entropy", teacher, normalizers.teacher),
    ):
        if name in names:
            parts[name] = _entropy(side, lse)
    return dict(zip(parts, normalizers.shard.sum(*parts.values()), strict=True))


def _weighted(gradient: Tensor, row_weights: Tensor) -> Tensor:
    """A gradient times its row's weight; 0 at a weight of 0, where it may be infinite."""
    return torch.where(row_weights == 0, 0, gradient * row_weights)


def _row_blocks(logits: Tensor, num_buffers: int = 0) -> Iterator[Any]:
    """Slices of rows, each with buffers (R, W) that the next block reuses."""
    num_rows, width = logits.shape
    size = max(1, num_rows if logits.is_cuda else ROW_BLOCK_LOGITS // max(1, width))
    buffers = logits.new_empty((num_buffers, min(size, num_rows), width))
    for at in slices(0, num_rows, size):
        yield (at, *buffers[:, : at.stop - at.start]) if num_buffers else at


def _terms(
    log_s: Tensor, log_t: Tensor, term: DivergenceTerm, entry_clip: float | None
) -> tuple[Tensor, Tensor, Tensor]:
    if entry_clip is not None:
        return term.clipped(log_s, log_t, entry_clip)
    value, dlog_s = term.function(log_s, log_t, term.parameter)
    return value, dlog_s, torch.zeros_like(value[:, :1])


def _write(
    dlogits: Tensor, row_weights: Tensor | None, logits: Tensor, cap: float | None, out: Tensor
) -> None:
    """Apply the soft-cap's derivative, scale, and round once into ``out``."""
    if cap is not None:
        dlogits.mul_(logits.clamp(min=-cap).div_(cap).square_().neg_().add_(1))
    if row_weights is None:
        out[:, : dlogits.shape[1]].copy_(dlogits)
    else:
        torch.mul(dlogits, row_weights[:, None], out=out[:, : dlogits.shape[1]])
