"""The row function of every divergence: a chunk's logits of both sides to losses and gradients.

Dimension key:  C rows in a chunk, W columns of a chunk's logits, K entries of the support
"""

from typing import NamedTuple

import torch
from torch import Tensor

from fused_sd.engine.chunk import Chunk, Objective
from fused_sd.objectives.truncated import SUPPORT_METRICS, TruncatedRow
from fused_sd.settings import setting
from fused_sd.terms.divergence import DivergenceTerm
from fused_sd.terms.support import overlap
from fused_sd.terms.weighting import capped_ratio
from fused_sd.torch_kernels.rows import ROW_METRICS, Normalizers

# metrics that read whole rows, or a sampled token's log-probability in them
WHOLE_METRICS = {
    *(*ROW_METRICS, *SUPPORT_METRICS, "top1_agreement", "topk_overlap"),
    *("student_log_prob", "teacher_log_prob"),
}


@setting
class DivergenceObjective(NamedTuple):
    """A divergence over a support, with its clips, its importance cap and its metrics.

    The per-token inputs are, in this order and where the settings ask for them: ``entry_ids`` (C,
    K), ``teacher_log_probs`` (C, K), ``token_ids`` (C,), ``old_log_probs`` (C,).
    """

    term: DivergenceTerm
    support: str  # "full", "student", "teacher", "union" (top-k of), "ids"
    k: int  # entries that a side chooses, or that are given
    remainder: str
    tail_floor: float | None
    log_prob_floor: float | None
    entry_clip: float | None
    token_clip: tuple[float | None, float | None] | None
    importance_cap: float | None
    input_names: tuple[str, ...]
    metrics: tuple[str, ...]

    @property
    def num_values(self) -> int:
        return 1

    @property
    def num_entries(self) -> int:
        if self.remainder != "renormalize" or self.support == "full":
            return 0
        return 2 * self.k if self.support == "union" else self.k

    @property
    def whole_sides(self) -> tuple[bool, bool]:
        if WHOLE_METRICS.intersection(self.metrics) or self.support in ("full", "union"):
            return True, True
        keeps_mass = self.remainder != "renormalize"
        student = self.support == "student" or keeps_mass or self.importance_cap is not None
        teacher = self.support == "teacher" or self.remainder in ("tail", "drop")
        return student, teacher

    def extras(self) -> list[tuple[bool, tuple[int, ...]]]:
        return [(False, ())] * (1 + len(self.metrics))

    def replay(self, extras: list[Tensor]) -> tuple[Objective, list[Tensor]]:
        return self, []

    def __call__(self, chunk: Chunk) -> tuple[Tensor, list[Tensor]]:
        inputs = dict(zip(self.input_names, chunk.inputs, strict=True))
        metrics: dict[str, Tensor] = {}
        token_ids = inputs.get("token_ids")
        sampled = None
        if token_ids is not None and chunk.student_side.whole is not None:
            sampled = chunk.part(chunk.student_side, token_ids[:, None])[:, 0]
        normalizers = self._observe(chunk, token_ids, metrics)
        row: _FullRow | TruncatedRow
        if self.support == "full":
            row = _FullRow(self, chunk, normalizers)
        else:
            row = TruncatedRow(self, chunk, inputs)

        ratio: Tensor | None = None
        if self.importance_cap is not None and sampled is not None:
            [sampled] = chunk.shard.sum(sampled)
            log_prob = sampled - row.student_normalizer()
            ratio, capped = capped_ratio(log_prob, inputs["old_log_probs"], self.importance_cap)
            metrics["importance_ratio"], metrics["importance_cap_fraction"] = ratio, capped
        row_weights = None
        if chunk.row_weights is not None:
            row_weights = chunk.row_weights[:, 0] * chunk.shaping.factor
            row_weights = row_weights if ratio is None else row_weights * ratio
        loss, is_open = row.loss_and_gradient_(row_weights, metrics)
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
        wanted, rows, normalizers = set(self.metrics), chunk.functions.rows, None
        named = wanted.intersection(ROW_METRICS)
        label_sides = [side for side in ("student", "teacher") if f"{side}_log_prob" in wanted]
        lse: dict[str, Tensor] = {}
        if chunk.teacher_side is None:
            if "student_entropy" in wanted:
                mine, part = rows.lse_and_entropy(chunk.student)
                [lse["student"]], [entropy], _ = chunk.shard.join([mine], entropies=[part])
                metrics["student_entropy"] = entropy
            elif label_sides:
                lse["student"] = chunk.log_normalizer(chunk.student_side)
        elif named or label_sides or self.support == "full":
            normalizers = rows.normalizers(*chunk.sides(), chunk.shard)
            lse = {"student": normalizers.student, "teacher": normalizers.teacher}
        for name in label_sides:
            side = chunk.student_side if name == "student" else chunk.teacher_side
            if side is not None and token_ids is not None:
                [label] = chunk.shard.sum(chunk.part(side, token_ids[:, None])[:, 0])
                metrics[f"{name}_log_prob"] = label - lse[name]
        if chunk.teacher_side is None:
            return None
        if named:
            metrics |= rows.row_metrics(*chunk.sides(), normalizers, named, chunk.shard)
        sides = chunk.student_side, chunk.teacher_side
        if "top1_agreement" in wanted:
            ids, other = (chunk.top_k(side, 1)[:, 0] for side in sides)
            metrics["top1_agreement"] = (ids == other).to(chunk.student)
        if "topk_overlap" in wanted:
            chosen = [chunk.top_k(side, self.k) for side in sides]
            metrics["topk_overlap"] = overlap(*chosen).to(chunk.student)
        return normalizers


class _FullRow:
    """Every entry of the vocabulary is compared."""

    def __init__(
        self, settings: DivergenceObjective, chunk: Chunk, normalizers: Normalizers | None
    ) -> None:
        assert normalizers is not None
        self.settings, self.chunk, self.normalizers = settings, chunk, normalizers
        self.num_entries: Tensor | int = 1
        if "entry_clip_fraction" in settings.metrics:
            [self.num_entries] = chunk.shard.sum((chunk.student > -torch.inf).sum(-1))

    def student_normalizer(self) -> Tensor:
        return self.normalizers.student

    def loss_and_gradient_(
        self, row_weights: Tensor | None, metrics: dict[str, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """The token's loss and whether it is open; ``row_weights`` given: write the gradient."""
        chunk, settings = self.chunk, self.settings
        term, clip, cap = settings.term, settings.entry_clip, chunk.shaping.cap
        compare = chunk.functions.rows.divergence_
        given = *chunk.sides(), self.normalizers, term, clip
        at_once = settings.token_clip is None  # else the loss decides whether there is a gradient
        given_out = cap, chunk.dlogits, chunk.shard
        loss, clipped = compare(*given, row_weights if at_once else None, *given_out)
        metrics["entry_clip_fraction"] = clipped / self.num_entries
        loss, is_open = settings.clip_tokens(loss)
        if row_weights is not None and not at_once:
            compare(*given, row_weights * is_open, *given_out)
        return loss, is_open
