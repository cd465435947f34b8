"""A row of which a truncated support is compared: its entries, and perhaps a bucket for the rest.

Dimension key:  C rows in a chunk, W columns of a chunk's logits, K entries of the support
"""

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from fused_sd.engine.chunk import Chunk, Side
from fused_sd.terms.support import (
    Buckets,
    bucket_terms,
    first_occurrence,
    log_complement,
    tail_gradient_to_entries,
)

if TYPE_CHECKING:
    from fused_sd.objectives.divergence import DivergenceObjective

SUPPORT_METRICS = ("student_mass", "teacher_mass", "student_tail_mass", "teacher_tail_mass")


class _Entries(NamedTuple):
    """The support's entries of a chunk."""

    ids: Tensor  # (C, K) int64
    counted: Tensor | None  # (C, K) bool; None: all
    student: Tensor  # (C, K) logits, -inf where not counted
    teacher: Tensor  # (C, K) logits, or log-probabilities where a server gave them


class TruncatedRow:
    """The entries of a truncated support are compared, and perhaps a bucket for the remainder."""

    def __init__(
        self, settings: "DivergenceObjective", chunk: Chunk, inputs: dict[str, Tensor]
    ) -> None:
        self.settings, self.chunk = settings, chunk
        self.keeps_tail = settings.remainder == "tail" and settings.tail_floor is None
        self.normalizers: list[Tensor] = []  # of the sides whose normaliser the remainder needs
        self.entries = self._entries(inputs)
        self.lse: Tensor | None = None  # of the student's row
        self.buckets = self._buckets()
        remainder, clip = settings.remainder, settings.entry_clip
        self.terms, self.dlog_s, self.clipped = bucket_terms(
            self._floored(), settings.term, remainder, clip
        )
        if settings.log_prob_floor is not None:
            is_below = self.buckets.log_s < settings.log_prob_floor
            self.dlog_s = self.dlog_s.masked_fill(is_below, 0)

    def _entries(self, inputs: dict[str, Tensor]) -> _Entries:
        """Choose the entries and read both sides' logits there."""
        chunk, support = self.chunk, self.settings.support
        counted = None
        if support == "ids":
            ids = inputs["entry_ids"]
            counted = first_occurrence(ids)
            ids = ids.clamp(min=0)
        else:
            k = self.settings.k
            of_student = [chunk.top_k(chunk.student_side, k)] if support != "teacher" else []
            of_teacher = [chunk.top_k(chunk.teacher_side, k)] if support != "student" else []
            ids = torch.cat(of_student + of_teacher, -1)
            counted = first_occurrence(ids) if support == "union" else None
        given = inputs.get("teacher_log_probs")
        if given is not None:
            counted = counted & (given > -torch.inf) if counted is not None else given > -torch.inf
        student, *others = self._read(ids, counted)
        teacher = others[0] if others else given
        assert teacher is not None
        teacher = teacher.to(student)
        if counted is not None:
            student = student.masked_fill(~counted, -torch.inf)
            teacher = teacher.masked_fill(~counted, -torch.inf)
        return _Entries(ids, counted, student, teacher)

    def _read(self, ids: Tensor, counted: Tensor | None) -> list[Tensor]:
        """The sides' logits at the entries; with them come the normalisers of all ranks.

        For a tail of its own log-sum-exp the entries are taken out of the rows.
        """
        chunk, remainder = self.chunk, self.settings.remainder
        sides = [side for side in (chunk.student_side, chunk.teacher_side) if side is not None]
        # sums in one order, so that a teacher that equals the student differs nowhere
        dotted = remainder == "renormalize" and any(side.whole is None for side in sides)
        parts = [chunk.part(side, ids, dotted=dotted) for side in sides]
        normalized = {"renormalize": [], "teacher_renormalize": sides[:1]}.get(remainder, sides)
        lses = []
        for side in normalized:
            assert side.whole is not None
            if self.keeps_tail:
                side.whole.scatter_(1, self._columns(ids, counted, chunk.width), -torch.inf)
            lses.append(chunk.functions.rows.log_normalizer(side.whole))
        self.normalizers, _, parts = chunk.shard.join(lses, extra_sums=parts)
        return parts

    def _buckets(self) -> Buckets:
        """Log-probabilities of the buckets, by the settings' remainder."""
        remainder, floor = self.settings.remainder, self.settings.tail_floor
        student, teacher = self.entries.student, self.entries.teacher
        given = self.chunk.teacher_side is None
        if remainder == "renormalize":
            return Buckets(student.log_softmax(-1), teacher.log_softmax(-1), None, True)
        if self.keeps_tail:
            rest = self.normalizers[0]
            log_s, self.lse = _with_tail(student, rest)
            if given:
                log_t = torch.cat([teacher, log_complement(teacher, 0.0)], -1)
            else:
                log_t, _ = _with_tail(teacher, self.normalizers[1])
            return Buckets(log_s, log_t, torch.where(rest == -torch.inf, 0, rest), True)
        self.lse = self.normalizers[0]
        log_s = student - self.lse[:, None]
        if remainder == "teacher_renormalize":
            return Buckets(log_s, teacher.log_softmax(-1), self.lse, False)
        log_t = teacher
        if not given:
            log_t = teacher - self.normalizers[1][:, None]
        if remainder == "tail":
            assert floor is not None
            log_s = torch.cat([log_s, log_complement(log_s, floor)], -1)
            log_t = torch.cat([log_t, log_complement(log_t, floor)], -1)
        return Buckets(log_s, log_t, self.lse, False)

    def _floored(self) -> Buckets:
        """The buckets as the terms see them: no entry that counts is below the floor."""
        floor, counted = self.settings.log_prob_floor, self.entries.counted
        if floor is None:
            return self.buckets
        log_s, log_t = self.buckets.log_s.clamp(min=floor), self.buckets.log_t.clamp(min=floor)
        if counted is not None:
            log_s, log_t = (side.masked_fill(~counted, -torch.inf) for side in (log_s, log_t))
        return self.buckets._replace(log_s=log_s, log_t=log_t)

    def _columns(self, ids: Tensor, counted: Tensor | None, num_columns: int) -> Tensor:
        """The entries' columns; those that do not count, or not here, point to the last."""
        columns = self.chunk.shard.columns(ids, num_columns - 1)
        return columns if counted is None else torch.where(counted, columns, num_columns - 1)

    def student_normalizer(self) -> Tensor:
        if self.lse is None:
            self.lse = self.chunk.log_normalizer(self.chunk.student_side)
        return self.lse

    def _observe(self, metrics: dict[str, Tensor]) -> None:
        wanted = set(self.settings.metrics)
        num_entries = self.clipped.shape[-1]
        metrics["entry_clip_fraction"] = self.clipped.sum(-1).to(self.terms) / num_entries
        if not wanted.intersection(SUPPORT_METRICS):
            return
        teacher_lse: Tensor | float = 0.0
        if self.chunk.teacher_side is not None:
            teacher_lse = self._whole_normalizer(self.chunk.teacher_side, self.entries.teacher)
        student_lse = self._whole_normalizer(self.chunk.student_side, self.entries.student)
        for name, entries, lse in (
            ("student", self.entries.student, student_lse),
            ("teacher", self.entries.teacher, teacher_lse),
        ):
            log_mass = (entries.logsumexp(-1) - lse).clamp(max=0)
            metrics[f"{name}_mass"] = log_mass.exp()
            metrics[f"{name}_tail_mass"] = -torch.expm1(log_mass)

    def _whole_normalizer(self, side: Side, entries: Tensor) -> Tensor:
        """Log-sum-exp of a row whose entries may have been masked."""
        rest = self.chunk.log_normalizer(side)
        return torch.logaddexp(rest, entries.logsumexp(-1)) if self.keeps_tail else rest

    def loss_and_gradient_(
        self, row_weights: Tensor | None, metrics: dict[str, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """The token's loss and whether it is open; ``row_weights`` given: write the gradient."""
        self._observe(metrics)
        loss, is_open = self.settings.clip_tokens(self.terms.sum(-1))
        if row_weights is not None:
            self._write_gradient_(row_weights * is_open)
        return loss, is_open

    def _write_gradient_(self, row_weights: Tensor) -> None:
        """A constant times a softmax outside the entries, and the entries written over it."""
        floor, k = self.settings.tail_floor, self.entries.ids.shape[-1]
        dlog_s, log_s = self.dlog_s, self.buckets.log_s
        if self.settings.remainder == "tail" and floor is not None:
            dlog_s, log_s = tail_gradient_to_entries(dlog_s, log_s, floor), log_s[:, :k]
        total = dlog_s.sum(-1, keepdim=True)
        cut = row_weights[:, None] == 0  # a token that is cut may be infinite
        share = (dlog_s - log_s.exp() * total) * row_weights[:, None]  # by the buckets' logits
        share, total = share.masked_fill(cut, 0), total.masked_fill(cut, 0)
        outside = share[:, k] if share.shape[-1] > k else -total[:, 0] * row_weights
        inside = share[:, :k]
        if self.entries.counted is not None:
            inside = inside.masked_fill(~self.entries.counted, 0)
        background = self.buckets.background
        entries = self.chunk.entries
        num_columns = self.chunk.width if entries is None else entries.vocab + 1
        columns = self._columns(self.entries.ids, self.entries.counted, num_columns)
        self.chunk.write_gradient_(background, outside, None, columns, self.entries.student, inside)


def _with_tail(entries: Tensor, rest: Tensor) -> tuple[Tensor, Tensor]:
    """Entries and tail as log-probabilities (C, K + 1), and the log-sum-exp of all."""
    lse = torch.logaddexp(entries.logsumexp(-1), rest)
    return torch.cat([entries, rest[:, None]], -1) - lse[:, None], lse
