"""The row function of every divergence: a chunk's logits of both sides to losses and gradients.

Dimension key:  C rows in a chunk, W columns of a chunk's logits, K entries of the support
"""

from typing import NamedTuple

import torch
from torch import Tensor

from fused_sd import specs
from fused_sd.chunk import Chunk, RowFunction
from fused_sd.divergence import DivergenceTerm
from fused_sd.rows import SUMMARY, Normalizers
from fused_sd.support import (
    Buckets,
    bucket_terms,
    first_occurrence,
    fold_tail,
    log_complement,
    overlap,
    top_k,
)
from fused_sd.weighting import capped_ratio

SUPPORT_METRICS = ("student_mass", "teacher_mass", "student_tail_mass", "teacher_tail_mass")


class _Entries(NamedTuple):
    """The support's entries of a chunk."""

    ids: Tensor  # (C, K) int64
    active: Tensor | None  # (C, K) bool; None: all
    student: Tensor  # (C, K) logits, -inf where not active
    teacher: Tensor  # (C, K) logits, or log-probabilities where a server gave them


@specs.setting
class DivergenceRows(NamedTuple):
    """A divergence over a support, with its clips, its importance cap and its metrics.

    The per-token inputs are, in this order and where the settings ask for them: ``entry_ids`` (C,
    K), ``teacher_log_probs`` (C, K), ``token_ids`` (C,), ``old_log_probs`` (C,).
    """

    term: DivergenceTerm
    support: str  # "full", "student", "teacher", "union" (top-k of), "ids"
    k: int
    remainder: str
    tail_floor: float | None
    entry_clip: float | None
    token_clip: tuple[float | None, float | None] | None
    importance_cap: float | None
    input_names: tuple[str, ...]
    metrics: tuple[str, ...]

    @property
    def num_values(self) -> int:
        return 1

    def extras(self) -> list[tuple[bool, tuple[int, ...]]]:
        return [(False, ())] * (1 + len(self.metrics))

    def replay(self, extras: list[Tensor]) -> tuple[RowFunction, list[Tensor]]:
        return self, []

    def __call__(self, chunk: Chunk) -> tuple[Tensor, list[Tensor]]:
        inputs = dict(zip(self.input_names, chunk.inputs, strict=True))
        metrics: dict[str, Tensor] = {}
        token_ids = inputs.get("token_ids")
        sampled = None if token_ids is None else chunk.student.gather(1, token_ids[:, None])[:, 0]
        normalizers = self._observe(chunk, token_ids, metrics)
        row: _FullRow | _BucketRow
        if self.support == "full":
            row = _FullRow(self, chunk, normalizers)
        else:
            row = _BucketRow(self, chunk, inputs)

        ratio: Tensor | None = None
        if self.importance_cap is not None and sampled is not None:
            log_prob = sampled - row.student_normalizer()
            ratio, capped = capped_ratio(log_prob, inputs["old_log_probs"], self.importance_cap)
            metrics["importance_ratio"], metrics["importance_cap_fraction"] = ratio, capped
        upstream = None
        if chunk.upstream is not None:
            upstream = chunk.upstream[:, 0] * chunk.shaping.factor
            upstream = upstream if ratio is None else upstream * ratio
        loss, is_open = row.loss_and_gradient_(upstream, metrics)
        metrics["token_clip_fraction"] = 1 - is_open
        values = loss if ratio is None else ratio * loss
        return values[:, None], [loss, *(metrics[name] for name in self.metrics)]

    def clip_tokens(self, loss: Tensor) -> tuple[Tensor, Tensor]:
        """The clipped loss, and 1 where it follows the logits."""
        if self.token_clip is None:
            return loss, torch.ones_like(loss)
        clipped = loss.clamp(*self.token_clip)
        return clipped, (clipped == loss).to(loss)

    def _observe(
        self, chunk: Chunk, token_ids: Tensor | None, metrics: dict[str, Tensor]
    ) -> Normalizers | None:
        """Metrics of whole rows, taken before any entry is masked or overwritten.

        Returns:
            Both sides' normalisers, where the metrics or the full vocabulary need them.
        """
        wanted, rows, normalizers = set(self.metrics), chunk.rows, None
        named = wanted.intersection(SUMMARY)
        label_sides = [side for side in ("student", "teacher") if f"{side}_log_prob" in wanted]
        lse: dict[str, Tensor] = {}
        if chunk.teacher is None:
            if "student_entropy" in wanted:
                lse["student"], metrics["student_entropy"] = rows.moments(chunk.student)
            elif label_sides:
                lse["student"] = rows.log_normalizer(chunk.student)
        elif named or label_sides or self.support == "full":
            normalizers = rows.normalizers(*chunk.sides())
            lse = {"student": normalizers.student, "teacher": normalizers.teacher}
        for side in label_sides:
            logits = chunk.student if side == "student" else chunk.teacher
            if logits is not None and token_ids is not None:
                label = logits.gather(1, token_ids[:, None])[:, 0]
                metrics[f"{side}_log_prob"] = label - lse[side]
        if chunk.teacher is None:
            return None
        if named:
            metrics |= rows.summary(*chunk.sides(), normalizers, named)
        if "top1_agreement" in wanted:
            agree = chunk.student.argmax(-1) == chunk.teacher.argmax(-1)
            metrics["top1_agreement"] = agree.to(chunk.student)
        if "topk_overlap" in wanted:
            chosen = [
                top_k(side, self.k, chunk.rows.block_maxima)
                for side in (chunk.student, chunk.teacher)
            ]
            metrics["topk_overlap"] = overlap(*chosen).to(chunk.student)
        return normalizers


class _FullRow:
    """Every entry of the vocabulary is compared."""

    def __init__(
        self, settings: DivergenceRows, chunk: Chunk, normalizers: Normalizers | None
    ) -> None:
        assert normalizers is not None
        self.settings, self.chunk, self.normalizers = settings, chunk, normalizers
        self.num_entries: Tensor | int = 1
        if "entry_clip_fraction" in settings.metrics:
            self.num_entries = (chunk.student > -torch.inf).sum(-1)

    def student_normalizer(self) -> Tensor:
        return self.normalizers.student

    def loss_and_gradient_(
        self, upstream: Tensor | None, metrics: dict[str, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """The token's loss and whether it is open; with ``upstream``, the gradient is written."""
        chunk, settings = self.chunk, self.settings
        term, clip, cap = settings.term, settings.entry_clip, chunk.shaping.cap
        compare = chunk.rows.divergence_
        given = *chunk.sides(), self.normalizers, term, clip
        at_once = settings.token_clip is None  # else the loss decides whether there is a gradient
        loss, clipped = compare(*given, upstream if at_once else None, cap, chunk.dlogits)
        metrics["entry_clip_fraction"] = clipped / self.num_entries
        loss, is_open = settings.clip_tokens(loss)
        if upstream is not None and not at_once:
            compare(*given, upstream * is_open, cap, chunk.dlogits)
        return loss, is_open


class _BucketRow:
    """The entries of a truncated support are compared, and perhaps a bucket for the remainder."""

    def __init__(self, settings: DivergenceRows, chunk: Chunk, inputs: dict[str, Tensor]) -> None:
        self.settings, self.chunk = settings, chunk
        self.entries = self._entries(inputs)
        self.lse: Tensor | None = None  # of the student's row, where the remainder needs it
        self.buckets = self._buckets()
        remainder, clip = settings.remainder, settings.entry_clip
        self.terms, self.dlog_s, self.clipped = bucket_terms(
            self.buckets, settings.term, remainder, clip
        )

    def _entries(self, inputs: dict[str, Tensor]) -> _Entries:
        """Choose the entries and gather both sides' logits there."""
        chunk, support, k = self.chunk, self.settings.support, self.settings.k
        active = None
        if support == "ids":
            ids = inputs["entry_ids"]
            active = first_occurrence(ids)
            ids = ids.clamp(min=0)
        else:
            assert chunk.teacher is not None
            sides = {"student": [chunk.student], "teacher": [chunk.teacher]}
            chosen = sides.get(support, [chunk.student, chunk.teacher])
            ids = torch.cat([top_k(side, k, chunk.rows.block_maxima) for side in chosen], -1)
            active = first_occurrence(ids) if support == "union" else None
        given = inputs.get("teacher_log_probs")
        if given is not None:
            active = active & (given > -torch.inf) if active is not None else given > -torch.inf
        teacher = given if chunk.teacher is None else chunk.teacher.gather(1, ids)
        assert teacher is not None
        student = chunk.student.gather(1, ids)
        teacher = teacher.to(student)
        if active is not None:
            student = student.masked_fill(~active, -torch.inf)
            teacher = teacher.masked_fill(~active, -torch.inf)
        return _Entries(ids, active, student, teacher)

    def _buckets(self) -> Buckets:
        """Log-probabilities of the buckets, by the settings' remainder."""
        remainder, floor = self.settings.remainder, self.settings.tail_floor
        student, teacher = self.entries.student, self.entries.teacher
        given = self.chunk.teacher is None
        if remainder == "renormalize":
            return Buckets(student.log_softmax(-1), teacher.log_softmax(-1), None, True)
        if remainder == "tail" and floor is None:
            log_s, rest, self.lse = self._with_tail(self.chunk.student, student)
            if given:
                log_t = torch.cat([teacher, log_complement(teacher, 0.0)], -1)
            else:
                log_t, _, _ = self._with_tail(self.chunk.teacher, teacher)
            return Buckets(log_s, log_t, torch.where(rest == -torch.inf, 0, rest), True)
        self.lse = self.chunk.rows.log_normalizer(self.chunk.student)
        log_s = student - self.lse[:, None]
        if remainder == "teacher_renormalize":
            return Buckets(log_s, teacher.log_softmax(-1), self.lse, False)
        log_t = teacher
        if not given:
            log_t = teacher - self.chunk.rows.log_normalizer(self.chunk.teacher)[:, None]
        if remainder == "tail":
            assert floor is not None
            log_s = torch.cat([log_s, log_complement(log_s, floor)], -1)
            log_t = torch.cat([log_t, log_complement(log_t, floor)], -1)
        return Buckets(log_s, log_t, self.lse, False)

    def _with_tail(self, logits: Tensor | None, entries: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Entries and tail as log-probabilities (C, K + 1), the log-sum-exp of the rest and of all.

        The entries are taken out of the row, so that the rest has its own log-sum-exp.
        """
        assert logits is not None
        logits.scatter_(1, self._columns(logits), -torch.inf)
        rest = self.chunk.rows.log_normalizer(logits)
        lse = torch.logaddexp(entries.logsumexp(-1), rest)
        return torch.cat([entries, rest[:, None]], -1) - lse[:, None], rest, lse

    def _columns(self, logits: Tensor) -> Tensor:
        """The entries' columns; those that do not count point to the padding."""
        ids, active = self.entries.ids, self.entries.active
        return ids if active is None else torch.where(active, ids, logits.shape[1] - 1)

    def student_normalizer(self) -> Tensor:
        if self.lse is None:
            self.lse = self.chunk.rows.log_normalizer(self.chunk.student)
        return self.lse

    def _observe(self, metrics: dict[str, Tensor]) -> None:
        wanted = set(self.settings.metrics)
        num_entries = self.clipped.shape[-1]
        metrics["entry_clip_fraction"] = self.clipped.sum(-1).to(self.terms) / num_entries
        if not wanted.intersection(SUPPORT_METRICS):
            return
        teacher_lse: Tensor | float = 0.0
        if self.chunk.teacher is not None:
            teacher_lse = self._whole_normalizer(self.chunk.teacher, self.entries.teacher)
        student_lse = self._whole_normalizer(self.chunk.student, self.entries.student)
        for name, entries, lse in (
            ("student", self.entries.student, student_lse),
            ("teacher", self.entries.teacher, teacher_lse),
        ):
            log_mass = (entries.logsumexp(-1) - lse).clamp(max=0)
            metrics[f"{name}_mass"] = log_mass.exp()
            metrics[f"{name}_tail_mass"] = -torch.expm1(log_mass)

    def _whole_normalizer(self, logits: Tensor, entries: Tensor) -> Tensor:
        """Log-sum-exp of a row whose entries may have been masked."""
        rest = self.chunk.rows.log_normalizer(logits)
        masked = self.settings.remainder == "tail" and self.settings.tail_floor is None
        return torch.logaddexp(rest, entries.logsumexp(-1)) if masked else rest

    def loss_and_gradient_(
        self, upstream: Tensor | None, metrics: dict[str, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """The token's loss and whether it is open; with ``upstream``, the gradient is written."""
        self._observe(metrics)
        loss, is_open = self.settings.clip_tokens(self.terms.sum(-1))
        if upstream is not None:
            self._write_gradient_(upstream * is_open)
        return loss, is_open

    def _write_gradient_(self, upstream: Tensor) -> None:
        """A constant times a softmax outside the entries, and the entries written over it."""
        floor, k = self.settings.tail_floor, self.entries.ids.shape[-1]
        dlog_s, log_s = self.dlog_s, self.buckets.log_s
        if self.settings.remainder == "tail" and floor is not None:
            dlog_s, log_s = fold_tail(dlog_s, log_s, floor), log_s[:, :k]
        total = dlog_s.sum(-1, keepdim=True)
        cut = upstream[:, None] == 0  # a token that is cut may be infinite
        share = (dlog_s - log_s.exp() * total) * upstream[:, None]  # by the buckets' logits
        share, total = share.masked_fill(cut, 0), total.masked_fill(cut, 0)
        outside = share[:, k] if share.shape[-1] > k else -total[:, 0] * upstream
        inside = share[:, :k]
        if self.entries.active is not None:
            inside = inside.masked_fill(~self.entries.active, 0)
        columns = self._columns(self.chunk.student)
        self.chunk.write_gradient_(
            self.buckets.background, outside, None, columns, self.entries.student, inside
        )
