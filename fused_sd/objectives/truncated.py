"""Compares rows on a truncated support: on its K entries and, with a tail, a bucket for the rest.

The support chooses its entries, both sides' logits are read there, and the comparison's remainder
says what the other entries become (``Buckets``).  The divergence is evaluated on those few columns,
by a kernel for the exact tail and for renormalised entries, and in PyTorch for the rarer ones.  The
gradient w.r.t. a whole row is then a constant times a softmax outside the entries, with the
entries' own values written over it.

Dimension key:  C rows in a chunk, W columns of a chunk's logits, K entries of the support
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fused_sd.checks.tensors import LARGEST_LOG_PROB
from fused_sd.engine.chunk import Chunk, Side
from fused_sd.terms.buckets import (
    Buckets,
    EntryTerms,
    bucket_terms,
    entry_terms,
    log_complement,
    renormalized,
    served_tail,
    tail_gradient_to_entries,
    with_tail,
)
from fused_sd.terms.comparison import Comparison
from fused_sd.terms.support import SIDES, SideName
from fused_sd.terms.weighting import clip_tokens
from fused_sd.torch_kernels.rows import ROW_METRICS, EntryGradient, log_probs

SUPPORT_METRICS = ("student_mass", "teacher_mass", "student_tail_mass", "teacher_tail_mass")


class _Entries(NamedTuple):
    """The support's entries of a chunk."""

    ids: Tensor  # (C, K) int64
    counted: Tensor | None  # (C, K) bool, which entries are compared; None: all
    student: Tensor  # (C, K) logits, -inf where not counted
    teacher: Tensor  # (C, K) logits, or log-probabilities where a server gave them
    sent: Tensor | None  # (C, K) those, in the dtype that the server sent


class TruncatedRows:
    """A chunk's rows, compared on the entries of a truncated support."""

    def __init__(self, comparison: Comparison, chunk: Chunk, inputs: dict[str, Tensor]) -> None:
        self.comparison, self.chunk = comparison, chunk
        # the exact tail is the log-sum-exp of the row once the support's entries are -inf
        self.has_exact_tail = comparison.remainder == "tail" and comparison.tail_floor is None
        self.normalizers: list[Tensor] = []  # of the sides whose normaliser the remainder needs
        self.lse: dict[SideName, Tensor] = {}  # known log-sum-exps of whole rows
        self.entries = self._entries(inputs)
        self.terms = self._terms()

    def _entries(self, inputs: dict[str, Tensor]) -> _Entries:
        """Choose the entries and read both sides' logits there."""
        ids, counted = self.comparison.support.choose(self.chunk, inputs)
        sent = inputs.get("teacher_log_probs")
        if sent is not None:  # what is no log-probability becomes NaN, and the loss with it
            sent = sent.masked_fill(sent > LARGEST_LOG_PROB, torch.nan)
        student, *others = self._read(ids, counted)
        if counted is not None:
            student, *others = (
                part.masked_fill(~counted, -torch.inf) for part in (student, *others)
            )
            sent = None if sent is None else sent.masked_fill(~counted, -torch.inf)
        teacher = others[0] if sent is None else sent.to(student)
        return _Entries(ids, counted, student, teacher, sent)

    def _read(self, ids: Tensor, counted: Tensor | None) -> list[Tensor]:
        """Read the sides' logits at the entries, and the normalisers that the remainder needs."""
        chunk, remainder = self.chunk, self.comparison.remainder
        sides = [side for side in (chunk.student_side, chunk.teacher_side) if side is not None]
        if self.has_exact_tail:
            return self._take_out(sides, ids, counted)
        # use the same summation order on both sides, so that an identical teacher gives exactly 0
        dotted = remainder == "renormalize" and any(side.whole is None for side in sides)
        parts = [chunk.part(side, ids, dotted=dotted) for side in sides]
        normalized = [] if remainder == "renormalize" else sides
        if remainder == "teacher_renormalize":
            normalized = sides[:1]
        lses = [chunk.functions.rows.log_normalizer(side.whole) for side in normalized]
        self.normalizers, _, parts = chunk.shard.join(lses, extra_sums=parts, dtype=parts[0].dtype)
        return parts

    def _take_out(self, sides: list[Side], ids: Tensor, counted: Tensor | None) -> list[Tensor]:
        """Read the entries of rows, which become their tails."""
        chunk = self.chunk
        self.masked = self._columns(ids, counted, chunk.width)
        found = [chunk.functions.entries.take_out_(side.whole, self.masked) for side in sides]
        parts = [entries for entries, _ in found]
        if not chunk.shard.alone:
            elsewhere = self.masked == chunk.width - 1
            parts = [entries.masked_fill(elsewhere, 0) for entries in parts]
        rests = [rest for _, rest in found]
        self.normalizers, _, parts = chunk.shard.join(rests, extra_sums=parts, dtype=parts[0].dtype)
        return parts

    def _terms(self) -> EntryTerms:
        """Loss and gradient of every row."""
        comparison, entries = self.comparison, self.entries
        is_served = self.chunk.teacher_side is None  # then the teacher has no logits
        if is_served or not (self.has_exact_tail or comparison.remainder == "renormalize"):
            return self._rare_terms(is_served)
        rests = tuple(self.normalizers) if self.has_exact_tail else None
        compare = self.chunk.functions.entries.compare_entries
        found: EntryTerms = compare(
            entries.student, entries.teacher, rests, comparison.term, comparison.entry_clip
        )
        if found.lses is not None:
            self.lse.update(zip(SIDES, found.lses))
        return found

    def _rare_terms(self, is_served: bool) -> EntryTerms:
        """Loss and gradient where a bucket has a floor, or the sides do not both sum to 1."""
        comparison, k = self.comparison, self.entries.ids.shape[-1]
        buckets = self._buckets(is_served)
        found = bucket_terms(
            self._floored(buckets), comparison.term, comparison.remainder, comparison.entry_clip
        )
        if comparison.log_prob_floor is not None:
            is_below = buckets.log_s < comparison.log_prob_floor
            found = found._replace(dlog_s=found.dlog_s.masked_fill(is_below, 0))
        if comparison.tail_floor is not None:
            dlog_s = tail_gradient_to_entries(found.dlog_s, buckets.log_s, comparison.tail_floor)
            found = found._replace(dlog_s=dlog_s)
            buckets = buckets._replace(log_s=buckets.log_s[:, :k])
        return entry_terms(buckets, found, k)

    def _buckets(self, is_served: bool) -> Buckets:
        """Log-probabilities of the buckets, by the comparison's remainder."""
        remainder, floor = self.comparison.remainder, self.comparison.tail_floor
        student, teacher = self.entries.student, self.entries.teacher
        if remainder == "renormalize":
            return Buckets(renormalized(student), renormalized(teacher), None, True)
        if self.has_exact_tail:
            [rest] = self.normalizers
            log_s, self.lse["student"] = with_tail(student, rest)
            assert self.entries.sent is not None
            tail = served_tail(self.entries.sent, rest > -torch.inf)
            log_t, _ = with_tail(teacher, tail)
            return Buckets(log_s, log_t, torch.where(rest == -torch.inf, 0, rest), True)
        self.lse.update(zip(SIDES, self.normalizers))
        background = self.lse["student"]
        log_s = log_probs(student, background)
        if remainder == "teacher_renormalize":
            return Buckets(log_s, renormalized(teacher), background, False)
        log_t = teacher if is_served else log_probs(teacher, self.lse["teacher"])
        if remainder == "tail":
            assert floor is not None
            log_s = torch.cat([log_s, log_complement(log_s, floor)], -1)
            log_t = torch.cat([log_t, log_complement(log_t, floor)], -1)
        return Buckets(log_s, log_t, background, False)

    def _floored(self, buckets: Buckets) -> Buckets:
        """The buckets with every counted log-probability raised to the floor."""
        floor, counted = self.comparison.log_prob_floor, self.entries.counted
        if floor is None:
            return buckets
        log_s, log_t = buckets.log_s.clamp(min=floor), buckets.log_t.clamp(min=floor)
        if counted is not None:
            log_s, log_t = (side.masked_fill(~counted, -torch.inf) for side in (log_s, log_t))
        return buckets._replace(log_s=log_s, log_t=log_t)

    def _columns(self, ids: Tensor, counted: Tensor | None, num_columns: int) -> Tensor:
        """The entries' columns; those that are not counted, or another rank's, get the last."""
        columns = self.chunk.shard.columns(ids, num_columns - 1)
        return columns if counted is None else torch.where(counted, columns, num_columns - 1)

    def normalizer(self, side: SideName) -> Tensor:
        """Log-sum-exp (C,), fp64, of a side's whole rows."""
        if side not in self.lse:
            self.lse[side] = self.chunk.log_normalizer(side)
        return self.lse[side]

    def loss_and_gradient_(
        self, row_weights: Tensor | None, names: Sequence[str]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return each token's loss and named metrics; with ``row_weights``, write the gradient."""
        loss, found = self.terms.loss, self._row_metrics(names) | self._masses(names)
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
            for whole, logits in zip(
                (chunk.student, chunk.teacher), self.entries[2:4], strict=True
            ):
                assert whole is not None
                whole.scatter_(1, self.masked, logits.masked_fill(behind, -torch.inf))
        found: dict[str, Tensor] = rows.row_metrics(*chunk.sides(), normalizers, named)
        if self.has_exact_tail:  # as the gradient expects them
            chunk.student.scatter_(1, self.masked, -torch.inf)
        return found

    def _masses(self, names: Sequence[str]) -> dict[str, Tensor]:
        """Both sides' mass on the support and outside it, each (C,), where one is named."""
        found: dict[str, Tensor] = {}
        for side in SIDES:
            if not {f"{side}_mass", f"{side}_tail_mass"}.intersection(names):
                continue
            is_served = side == "teacher" and self.chunk.teacher_side is None
            entries: Tensor = getattr(self.entries, side)
            if not is_served:  # a server's are log-probabilities already
                entries = log_probs(entries, self.normalizer(side))
            log_mass = entries.logsumexp(-1).clamp(max=0)
            found[f"{side}_mass"] = log_mass.exp()
            found[f"{side}_tail_mass"] = -torch.expm1(log_mass)
        return found

    def _entry_clip_fraction(self) -> Tensor:
        """Share (C,) of the compared buckets that the entry clip cut."""
        assert self.terms.clipped is not None
        counted, has_tail = self.entries.counted, self.comparison.remainder == "tail"
        num_compared = self.entries.ids.shape[-1] if counted is None else counted.sum(-1)
        num_compared = torch.as_tensor(num_compared + has_tail).clamp(min=1)
        return self.terms.clipped.to(self.terms.loss) / num_compared

    def _write_gradient_(self, row_weights: Tensor) -> None:
        """Write a constant times a softmax outside the entries, and the entries' own values."""
        terms, sparse = self.terms, self.chunk.sparse
        num_columns = self.chunk.width if sparse is None else sparse.vocab + 1
        columns = self._columns(self.entries.ids, self.entries.counted, num_columns)
        entries = EntryGradient(columns, self.entries.student, terms.inside, row_weights)
        self.chunk.write_gradient_(terms.background, terms.outside, None, entries)
