"""Functions on whole rows of logits, in PyTorch: normalisers, divergences, gradients, metrics.

This is the last stop of a loss on a CPU: an objective calls these functions on a chunk's logits.
``kernels/rows.py`` is the twin for a GPU, with the same names, arguments and results.  Rows are
(C, W) logits in fp32 or fp64; a column of -inf has no mass.  A trailing underscore says that the
gradient may be written over the logits.

A block of a few rows is processed at a time (``row_blocks.py``), in memory that the next block
reuses, so that all of it stays in the CPU's caches.  Blocks whose log-ratios are moderate take the
in-place forms of ``near.py``, which select nothing by a mask, because a mask costs as much as ten
multiplications; other blocks take the general functions of ``terms/divergence.py``, where the
formulas are.

A log-sum-exp is a logit, perhaps a large one, plus a small logarithm.  Its sum is kept in fp64, for
fp32 rows too: log-probabilities then lose nothing where all logits of a row have a large offset in
common, as with the subtraction of the largest logit in PyTorch's log-softmax.

Where ranks share the vocabulary, a function of two sides returns numbers over all ranks' columns, a
function of one side numbers over this rank's columns.

Dimension key:  C rows in a chunk, R rows of a block, W columns
"""

from collections.abc import Collection
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fused_sd.head.vocab_shard import WHOLE, VocabShard
from fused_sd.terms.divergence_term import DivergenceTerm
from fused_sd.torch_kernels.near import FORMS, Block, clip_, has_form
from fused_sd.torch_kernels.row_blocks import for_row_blocks

READS_PADDING = False  # a column that is -inf on both sides has a log-ratio of NaN
FLOOR = -1e4  # lower bound of log-probabilities that multiply a probability of 0: 0 * -inf is NaN
# metrics over the full vocabulary: divergences, then both entropies
ROW_METRIC_TERMS = {
    name: DivergenceTerm(name, parameter)
    for name, parameter in (("forward_kl", 0.0), ("reverse_kl", 0.0), ("jsd", 0.5))
}
ROW_METRICS = (*ROW_METRIC_TERMS, "student_entropy", "teacher_entropy")


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


class _Loss(NamedTuple):
    """A divergence that is a loss, and its gradient."""

    term: DivergenceTerm
    entry_clip: float | None
    gradient: RowGradient | None
    total: Tensor | None  # (C,) sum of dlog_s over all ranks; None: these are all columns


class Normalizers(NamedTuple):
    """Log-sum-exps of a chunk's rows on both sides."""

    student: Tensor  # (C,) fp64
    teacher: Tensor  # (C,) fp64
    state: Any  # what the backend keeps beside them for its other functions
    shard: VocabShard  # which columns the rows have, where ranks share the vocabulary
    largest: Tensor | None = None  # (C, 2) columns of both sides' largest logits; None: not wanted


def log_normalizer(logits: Tensor) -> Tensor:
    """Log-sum-exp of each row: (C,) fp64."""
    lse = logits.new_empty(logits.shape[0], dtype=torch.float64)

    def find(at: slice, shifted: Tensor) -> None:
        anchor, log_scale = _anchored(logits[at], shifted)
        torch.add(anchor, log_scale, out=lse[at])

    for_row_blocks(logits, 1, find)
    return lse


def _anchored(logits: Tensor, shifted: Tensor) -> tuple[Tensor, Tensor]:
    """The largest logit of each row, fp64, and the log-sum-exp of the row less that: (R,) each."""
    lowest = torch.finfo(logits.dtype).min  # finite, for a row without mass
    anchor = logits.new_full(logits.shape[:1], lowest)
    if logits.shape[1]:  # a rank whose columns are all padding has none
        torch.clamp(logits.amax(-1), min=lowest, out=anchor)
    torch.sub(logits, anchor[:, None], out=shifted)
    return anchor.double(), shifted.exp_().sum(-1).log()


def log_probs(logits: Tensor, normalizer: Tensor) -> Tensor:
    """Log-probabilities (C, K) of logits, in their dtype, by their rows' log-sum-exps (C,)."""
    return torch.sub(logits, normalizer[:, None], out=torch.empty_like(logits))


def lse_and_entropy(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Log-sum-exp of each row, fp64, and its entropy in nats: (C,) each."""
    entropy = logits.new_empty(logits.shape[0])
    lse = torch.empty_like(entropy, dtype=torch.float64)

    def find(at: slice, log_probs: Tensor, share: Tensor, spare: Tensor) -> None:
        anchor, log_scale = _anchored(logits[at], share)
        torch.add(anchor, log_scale, out=lse[at])
        torch.sub(logits[at], anchor.to(logits.dtype)[:, None], out=log_probs)
        log_probs.sub_(log_scale[:, None])
        _find_entropy(log_probs, share, spare, entropy[at])

    for_row_blocks(logits, 3, find)
    return lse, entropy


def normalizers(
    student: Tensor, teacher: Tensor, shard: VocabShard = WHOLE, has_largest: bool = False
) -> Normalizers:
    """Log-sum-exps of both sides' rows.

    Args:
        student, teacher: logits of both sides.
        shard: which columns these are.
        has_largest: whether the columns of the largest logits are wanted, of equal ones the first.
    """
    own = [log_normalizer(student), log_normalizer(teacher)]
    lses = shard.join(own, dtype=student.dtype).normalizers
    largest = None
    if has_largest:
        largest = torch.stack([student.argmax(-1), teacher.argmax(-1)], 1)
    return Normalizers(lses[0], lses[1], None, shard, largest)


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
    given, shard = (student, teacher, normalizers), normalizers.shard
    own = {term.name} if entry_clip is None and ROW_METRIC_TERMS.get(term.name) == term else set()
    wanted = ["loss", *(name for name in names if name not in own)]
    if entry_clip is not None:
        wanted.append("clipped")
    if gradient is not None:
        wanted.append("total")
    loss = _Loss(term, entry_clip, gradient if shard.alone else None, None)
    sums = _compare(*given, wanted, loss)
    if gradient is not None and not shard.alone:
        _compare(*given, (), loss._replace(gradient=gradient, total=sums["total"]))
    metrics = {name: sums["loss" if name in own else name] for name in names}
    return Compared(sums["loss"], sums.get("clipped"), metrics)


def row_metrics(
    student: Tensor,
    teacher: Tensor,
    normalizers: Normalizers,
    names: Collection[str],
) -> dict[str, Tensor]:
    """Metrics over the full vocabulary: those of ``ROW_METRICS`` that are named, each (C,)."""
    return _compare(student, teacher, normalizers, names, None)


def _compare(
    student: Tensor,
    teacher: Tensor,
    normalizers: Normalizers,
    wanted: Collection[str],
    loss: _Loss | None,
) -> dict[str, Tensor]:
    """Find sums over all ranks' columns, each (C,), and write the gradient over these columns.

    Args:
        wanted: which sums: metrics of ``ROW_METRICS``, and of a loss ``"loss"``, ``"clipped"`` (its
            number of clipped entries) and ``"total"`` (of ``dlog_s``).
        loss: the loss and its gradient; None: metrics alone.
    """
    lse_s, lse_t, shard = normalizers.student, normalizers.teacher, normalizers.shard
    sums = {name: student.new_empty(student.shape[0]) for name in wanted}
    metrics = {name: term for name, term in ROW_METRIC_TERMS.items() if name in sums}
    terms = [*metrics.values()] if loss is None else [*metrics.values(), loss.term]
    have_forms = all(map(has_form, terms))

    def compare(at: slice, *buffers: Tensor) -> None:
        block = Block(*buffers)
        block.fill_(student[at], teacher[at], lse_s[at], lse_t[at])
        for name, log_probs in (("student_entropy", block.s), ("teacher_entropy", block.t)):
            if name in sums:
                _find_entropy(log_probs, block.one, block.other, sums[name][at])
        is_near = have_forms and block.exponentiate_near_()
        for name, term in metrics.items():
            kept = block._replace(r=block.r.clone())
            torch.sum(_terms(kept, is_near, term, None)[0], -1, out=sums[name][at])
        if loss is None:
            return
        value, dlog_s, num_clipped = _terms(block, is_near, loss.term, loss.entry_clip)
        if "loss" in sums:
            torch.sum(value, -1, out=sums["loss"][at])
        if num_clipped is not None and "clipped" in sums:
            sums["clipped"][at] = num_clipped
        if "total" in sums:
            torch.sum(dlog_s, -1, out=sums["total"][at])
        if loss.gradient is not None:
            row_weights, cap, out = loss.gradient
            total = sums["total"] if loss.total is None else loss.total
            s = block.s if is_near else block.s.exp_()
            dlogits = dlog_s.sub_(s.mul_(total[at, None]))
            if not is_near:  # a row of weight 0 may hold infinite terms, and 0 * inf is NaN
                dlogits.masked_fill_(row_weights[at, None] == 0, 0)
            _write(dlogits, row_weights[at], student[at], cap, out[at])

    for_row_blocks(student, len(Block._fields), compare)
    return dict(zip(sums, shard.sum(*sums.values()), strict=True))


def softmax_gradient_(
    logits: Tensor,  # (C, W)
    normalizer: Tensor,  # (C,) fp64
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
    normalizer, constant, slope = without_rounding(normalizer, constant, slope, logits.dtype)

    def write(at: slice, shifted: Tensor, share: Tensor) -> None:
        torch.sub(logits[at], normalizer[at, None], out=shifted)
        torch.exp(shifted, out=share)
        if slope is not None:
            factor = shifted.clamp_(min=FLOOR).mul_(slope[at, None]).add_(constant[at, None])
            _write(share.mul_(factor), None, logits[at], cap, out[at])
        else:
            _write(share, constant[at], logits[at], cap, out[at])

    for_row_blocks(logits, 2, write)
    if entries is not None:
        out.scatter_(1, entries.columns, entries.weighted(cap).to(out.dtype))


def without_rounding(
    normalizer: Tensor, constant: Tensor, slope: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Round normalisers to the logits' dtype; the other numbers make up for what that loses.

    With a part ``rest`` lost, ``exp(x) (constant + slope x)`` at ``x - rest`` is
    ``exp(x) exp(-rest) ((constant - slope rest) + slope x)``.
    """
    rounded = normalizer.to(dtype)
    rest = (normalizer - rounded).to(dtype)
    share = torch.exp(-rest)
    if slope is not None:
        constant, slope = constant - slope * rest, slope * share
    return rounded, constant * share, slope


def _weighted(gradient: Tensor, row_weights: Tensor) -> Tensor:
    """A gradient times its row's weight; 0 at a weight of 0, where it may be infinite."""
    return torch.where(row_weights == 0, 0, gradient * row_weights)


def _find_entropy(log_probs: Tensor, share: Tensor, spare: Tensor, out: Tensor) -> None:
    """Part of these columns (R, W) in the entropy of their rows; log-probabilities stay."""
    torch.exp(log_probs, out=share)
    torch.clamp(log_probs, min=FLOOR, out=spare)
    torch.sum(share.mul_(spare), -1, out=out)
    out.neg_()


def _terms(
    block: Block, is_near: bool, term: DivergenceTerm, entry_clip: float | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Terms and ``dlog_s`` (R, W) of a block, and how many of a row's terms are clipped: (R,)."""
    if is_near:
        value, dlog_s = FORMS[term.name].evaluate(block, term.parameter)
        if entry_clip is None:
            return value, dlog_s, None
        return clip_(block, value, dlog_s, term.balance, entry_clip)
    if entry_clip is None:
        return *term.function(block.s, block.t, term.parameter), None
    value, dlog_s, is_clipped = term.clipped(block.s, block.t, entry_clip)
    return value, dlog_s, is_clipped.sum(-1)


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
