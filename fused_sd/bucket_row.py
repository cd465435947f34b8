"""A row of which a truncated support is compared: its entries, and perhaps a bucket for the rest.

Dimension key:  C rows in a chunk, W columns of a chunk's logits, K entries of the support
"""

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from fused_sd.chunk import Chunk
from fused_sd.support import Buckets, bucket_terms, first_occurrence, fold_tail, log_complement

if TYPE_CHECKING:
    from fused_sd.divergence_rows import DivergenceRows

SUPPORT_METRICS = ("student_mass", "teacher_mass", "student_tail_mass", "teacher_tail_mass")


class _Entries(NamedTuple):
    """The support's entries of a chunk."""

    ids: Tensor  # (C, K) int64
    active: Tensor | None  # (C, K) bool; None: all
    student: Tensor  # (C, K) logits, -inf where not active
    teacher: Tensor  # (C, K) logits, or log-probabilities where a server gave them


class BucketRow:
    """The entries of a truncated support are compared, and perhaps a bucket for the remainder."""

    def __init__(self, settings: "DivergenceRows", chunk: Chunk, inputs: dict[str, Tensor]) -> None:
        self.settings, self.chunk = settings, chunk
        self.entries = self._entries(inputs)
        self.lse: Tensor | None = None  # of the student's row, where the remainder needs it
        self.buckets = self._buckets()
        remainder, clip = settings.remainder, settings.entry_clip
        self.terms, self.dlog_s, self.clipped = bucket_terms(
            self.buckets, settings.term, remainder, clip
        )

    def _entries(self, inputs: dict[str, Tensor]) -> _Entries:
        """Choose the entries and read both sides' logits there."""
        chunk, support = self.chunk, self.settings.support
        active = None
        if support == "ids":
            ids = inputs["entry_ids"]
            active = first_occurrence(ids)
            ids = ids.clamp(min=0)
        else:
            top_k, k = chunk.functions.sparse.top_k, self.settings.k
            of_student = [top_k(chunk.student, k)] if support != "teacher" else []
            of_teacher = [top_k(chunk.teacher, k)] if support != "student" else []
            ids = torch.cat(of_student + of_teacher, -1)
            active = first_occurrence(ids) if support == "union" else None
        given = inputs.get("teacher_log_probs")
        if given is not None:
            active = active & (given > -torch.inf) if active is not None else given > -torch.inf
        sides = [side for side in (chunk.student_side, chunk.teacher_side) if side is not None]
        # sums in one order, so that a teacher that equals the student differs nowhere
        alike = self.settings.remainder == "renormalize" and any(s.whole is None for s in sides)
        student, *others = (s.dot_products(ids) if alike else s.at(ids) for s in sides)
        teacher = others[0] if others else given
        assert teacher is not None
        teacher = teacher.to(student)
        if active is not None:
            student = student.masked_fill(~active, -torch.inf)
            teacher = teacher.masked_fill(~active, -torch.inf)
        return _Entries(ids, active, student, teacher)

    def _buckets(self) -> Buckets:
        """Log-probabilities of the buckets, by the settings' remainder."""
        remainder, floor = self.settings.remainder, self.settings.tail_floor
        student, teacher = self.entries.student, self.entries.teacher
        given = self.chunk.teacher_side is None
        if remainder == "renormalize":
            return Buckets(student.log_softmax(-1), teacher.log_softmax(-1), None, True)
        if remainder == "tail" and floor is None:
            log_s, rest, self.lse = self._with_tail(self.chunk.student, student)
            if given:
                log_t = torch.cat([teacher, log_complement(teacher, 0.0)], -1)
            else:
                log_t, _, _ = self._with_tail(self.chunk.teacher, teacher)
            return Buckets(log_s, log_t, torch.where(rest == -torch.inf, 0, rest), True)
        self.lse = self._log_normalizer(self.chunk.student)
        log_s = student - self.lse[:, None]
        if remainder == "teacher_renormalize":
            return Buckets(log_s, teacher.log_softmax(-1), self.lse, False)
        log_t = teacher
        if not given:
            log_t = teacher - self._log_normalizer(self.chunk.teacher)[:, None]
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
        logits.scatter_(1, self._columns(logits.shape[1]), -torch.inf)
        rest = self._log_normalizer(logits)
        lse = torch.logaddexp(entries.logsumexp(-1), rest)
        return torch.cat([entries, rest[:, None]], -1) - lse[:, None], rest, lse

    def _columns(self, num_columns: int) -> Tensor:
        """The entries' columns; those that do not count point to the last, which is padding."""
        ids, active = self.entries.ids, self.entries.active
        return ids if active is None else torch.where(active, ids, num_columns - 1)

    def _log_normalizer(self, logits: Tensor | None) -> Tensor:
        assert logits is not None
        lse: Tensor = self.chunk.functions.rows.log_normalizer(logits)
        return lse

    def student_normalizer(self) -> Tensor:
        if self.lse is None:
            self.lse = self._log_normalizer(self.chunk.student)
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
        rest = self._log_normalizer(logits)
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
        background = self.buckets.background
        if background is None:
            assert self.chunk.entries is not None
            columns = self._columns(self.chunk.entries.vocab + 1)
        else:
            columns = self._columns(self.chunk.student.shape[1])
        self.chunk.write_gradient_(background, outside, None, columns, self.entries.student, inside)
