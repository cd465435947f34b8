"""Compares rows on a truncated support: on its K entries and, with a tail, a bucket for the rest.

The support chooses its entries, both sides' logits are read there, and the comparison's remainder
says what the other entries become (``Buckets``).  The divergence is evaluated on those few columns.
The gradient w.r.t. a whole row is then a constant times a softmax outside the entries, with the
entries' own values written over it.

Dimension key:  C rows in a chunk, W columns of a chunk's logits, K entries of the support
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fused_sd.engine.chunk import Chunk, Side
from fused_sd.terms.buckets import (
    Buckets,
    bucket_terms,
    log_complement,
    tail_gradient_to_entries,
    with_tail,
)
from fused_sd.terms.comparison import Comparison
from fused_sd.terms.support import SideName
from fused_sd.terms.weighting import clip_tokens
from fused_sd.torch_kernels.rows import ROW_METRICS

SUPPORT_METRICS = ("student_mass", "teacher_mass", "student_tail_mass", "teacher_tail_mass")


class _Entries(NamedTuple):
    """The support's entries of a chunk."""

    ids: Tensor  # (C, K) int64
    counted: Tensor | None  # (C, K) bool, which entries are compared; None: all
    student: Tensor  # (C, K) logits, -inf where not counted
    teacher: Tensor  # (C, K) logits, or log-probabilities where a server gave them


class TruncatedRows:
    """A chunk's rows, compared on the entries of a truncated support."""

    def __init__(self, comparison: Comparison, chunk: Chunk, inputs: dict[str, Tensor]) -> None:
        self.comparison, self.chunk = comparison, chunk
        # the exact tail is the log-sum-exp of the row once the support's entries are -inf
        self.has_exact_tail = comparison.remainder == "tail" and comparison.tail_floor is None
        self.normalizers: list[Tensor] = []  # of the sides whose normaliser the remainder needs
        self.lse: dict[SideName, Tensor] = {}  # known log-sum-exps of whole rows
        self.entries = self._entries(inputs)
        self.buckets = self._buckets()
        compared = self._floored()
        self.terms, self.dlog_s, self.clipped = bucket_terms(
            compared, comparison.term, comparison.remainder, comparison.entry_clip
        )
        if comparison.log_prob_floor is not None:
            is_below = self.buckets.log_s < comparison.log_prob_floor
            self.dlog_s = self.dlog_s.masked_fill(is_below, 0)

    def _entries(self, inputs: dict[str, Tensor]) -> _Entries:
        """Choose the entries and read both sides' logits there."""
        ids, counted = self.comparison.support.choose(self.chunk, inputs)
        given = inputs.get("teacher_log_probs")
        if given is not None:
            is_given = given > -torch.inf
            counted = is_given if counted is None else counted & is_given
        student, *others = self._read(ids, counted)
        teacher = others[0] if others else given
        assert teacher is not None
        teacher = teacher.to(student)
        if counted is not None:
            student = student.masked_fill(~counted, -torch.inf)
            teacher = teacher.masked_fill(~counted, -torch.inf)
        return _Entries(ids, counted, student, teacher)

    def _read(self, ids: Tensor, counted: Tensor | None) -> list[Tensor]:
        """Read the sides' logits at the entries, and the normalisers that the remainder needs."""
        chunk, remainder = self.chunk, self.comparison.remainder
        if self.has_exact_tail:
            self.masked = self._columns(ids, counted, chunk.width)
        sides = [side for side in (chunk.student_side, chunk.teacher_side) if side is not None]
        # use the same summation order on both sides, so that an identical teacher gives exactly 0
        dotted = remainder == "renormalize" and any(side.whole is None for side in sides)
        parts = [chunk.part(side, ids, dotted=dotted) for side in sides]
        lses = []
        for side in self._normalized(sides):
            assert side.whole is not None
            if self.has_exact_tail:
                side.whole.scatter_(1, self.masked, -torch.inf)
            lses.append(chunk.functions.rows.log_normalizer(side.whole))
        self.normalizers, _, parts = chunk.shard.join(lses, extra_sums=parts)
        return parts

    def _normalized(self, sides: list[Side]) -> list[Side]:
        """The sides whose whole rows' normalisers the remainder needs."""
        if self.comparison.remainder == "renormalize":
            return []
        return sides[:1] if self.comparison.remainder == "teacher_renormalize" else sides

    def _buckets(self) -> Buckets:
        """Log-probabilities of the buckets, by the comparison's remainder."""
        remainder, floor = self.comparison.remainder, self.comparison.tail_floor
        student, teacher = self.entries.student, self.entries.teacher
        is_served = self.chunk.teacher_side is None  # then the teacher has no logits
        if remainder == "renormalize":
            return Buckets(student.log_softmax(-1), teacher.log_softmax(-1), None, True)
        if self.has_exact_tail:
            rest = self.normalizers[0]
            log_s, self.lse["student"] = with_tail(student, rest)
            if is_served:
                log_t = torch.cat([teacher, log_complement(teacher, 0.0)], -1)
            else:
                log_t, self.lse["teacher"] = with_tail(teacher, self.normalizers[1])
            return Buckets(log_s, log_t, torch.where(rest == -torch.inf, 0, rest), True)
        self.lse.update(zip(("student", "teacher"), self.normalizers))
        background = self.lse["student"]
        log_s = student - background[:, None]
        if remainder == "teacher_renormalize":
            return Buckets(log_s, teacher.log_softmax(-1), background, False)
        log_t = teacher if is_served else teacher - self.lse["teacher"][:, None]
        if remainder == "tail":
            assert floor is not None
            log_s = torch.cat([log_s, log_complement(log_s, floor)], -1)
            log_t = torch.cat([log_t, log_complement(log_t, floor)], -1)
        return Buckets(log_s, log_t, background, False)

    def _floored(self) -> Buckets:
        """The buckets with every counted log-probability raised to the floor."""
        floor, counted = self.comparison.log_prob_floor, self.entries.counted
        if floor is None:
            return self.buckets
        log_s, log_t = self.buckets.log_s.clamp(min=floor), self.buckets.log_t.clamp(min=floor)
        if counted is not None:
            log_s, log_t = (side.masked_fill(~counted, -torch.inf) for side in (log_s, log_t))
        return self.buckets._replace(log_s=log_s, log_t=log_t)

    def _columns(self, ids: Tensor, counted: Tensor | None, num_columns: int) -> Tensor:
        """The entries' columns; those that are not counted, or another rank's, get the last."""
        columns = self.chunk.shard.columns(ids, num_columns - 1)
        return columns if counted is None else torch.where(counted, columns, num_columns - 1)

    def normalizer(self, side: SideName) -> Tensor:
        """Log-sum-exp (C,) of a side's whole rows."""
        if side not in self.lse:
            self.lse[side] = self.chunk.log_normalizer(side)
        return self.lse[side]

    def loss_and_gradient_(
        self, row_weights: Tensor | None, names: Sequence[str]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return each token's loss and named metrics; with ``row_weights``, write the gradient."""
        loss, found = self.terms.sum(-1), self._row_metrics(names) | self._masses(names)
        if "entry_clip_fraction" in names:
            found["entry_clip_fraction"] = self._entry_clip_fraction()
        bounds = self.comparison.token_bounds
        if bounds is not None:
            loss, is_unclipped = clip_tokens(loss, bounds)
            found["token_clip_fraction"] = 1 - is_unclipped
            row_weights = None if row_weights is None else row_weights * is_unclipped
        if row_weights is not None:
            self._write_gradient_(row_weights)
        return loss, found

    def _row_metrics(self, names: Sequence[str]) -> dict[str, Tensor]:
        """Metrics of whole rows: one read, in which masked entries are back in their places."""
        chunk, rows = self.chunk, self.chunk.functions.rows
        named = [name for name in names if name in ROW_METRICS]
        if not named or chunk.teacher_side is None:
            return {}
        if self.lse:
            lses = self.normalizer("student"), self.normalizer("teacher")
            normalizers = rows.known_normalizers(*lses, chunk.shard)
        else:
            normalizers = rows.normalizers(*chunk.sides(), chunk.shard)
        if self.has_exact_tail:
            behind = self.masked == chunk.width - 1  # where there is no column to put back
            for whole, logits in zip((chunk.student, chunk.teacher), self.entries[2:], strict=True):
                assert whole is not None
                whole.scatter_(1, self.masked, logits.masked_fill(behind, -torch.inf))
        found: dict[str, Tensor] = rows.row_metrics(*chunk.sides(), normalizers, named)
        if self.has_exact_tail:  # as the gradient expects them
            chunk.student.scatter_(1, self.masked, -torch.inf)
        return found

    def _masses(self, names: Sequence[str]) -> dict[str, Tensor]:
        """Both sides' mass on the support and outside it, each (C,), where one is named."""
        found: dict[str, Tensor] = {}
        sides: tuple[SideName, SideName] = ("student", "teacher")
        for side in sides:
            if not {f"{side}_mass", f"{side}_tail_mass"}.intersection(names):
                continue
            is_served = side == "teacher" and self.chunk.teacher_side is None
            log_mass: Tensor = getattr(self.entries, side).logsumexp(-1)
            if not is_served:  # a server's are log-probabilities already
                log_mass = log_mass - self.normalizer(side)
            log_mass = log_mass.clamp(max=0)
            found[f"{side}_mass"] = log_mass.exp()
            found[f"{side}_tail_mass"] = -torch.expm1(log_mass)
        return found

    def _entry_clip_fraction(self) -> Tensor:
        """Share (C,) of the compared entries, the tail among them, that the entry clip cut."""
        num_compared: Tensor | int = self.clipped.shape[-1]
        if self.entries.counted is not None:
            places = self.entries.counted.shape[-1]
            num_compared = self.entries.counted.sum(-1) + (self.clipped.shape[-1] - places)
        return self.clipped.sum(-1).to(self.terms) / num_compared

    def _write_gradient_(self, row_weights: Tensor) -> None:
        """Write a constant times a softmax outside the entries, and the entries' own values."""
        floor, k = self.comparison.tail_floor, self.entries.ids.shape[-1]
        dlog_s, log_s = self.dlog_s, self.buckets.log_s
        if floor is not None:
            dlog_s, log_s = tail_gradient_to_entries(dlog_s, log_s, floor), log_s[:, :k]
        total = dlog_s.sum(-1, keepdim=True)
        cut = (
            row_weights[:, None] == 0
        )  # a row of weight 0 may hold infinite terms, and 0 * inf is NaN
        dlogits = (dlog_s - log_s.exp() * total) * row_weights[:, None]  # w.r.t. the buckets
        dlogits, total = dlogits.masked_fill(cut, 0), total.masked_fill(cut, 0)
        outside = dlogits[:, k] if dlogits.shape[-1] > k else -total[:, 0] * row_weights
        inside = dlogits[:, :k]
        if self.entries.counted is not None:
            inside = inside.masked_fill(~self.entries.counted, 0)
        background, sparse = self.buckets.background, self.chunk.sparse
        num_columns = self.chunk.width if sparse is None else sparse.vocab + 1
        columns = self._columns(self.entries.ids, self.entries.counted, num_columns)
        self.chunk.write_gradient_(background, outside, None, columns, self.entries.student, inside)
