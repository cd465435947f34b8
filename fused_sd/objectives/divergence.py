"""The objective of every divergence: a chunk's logits of both sides become losses and gradients.

The chunk loop calls the objective with a ``Chunk`` (``engine/chunk.py``); the objective returns
token losses and metrics, and writes dlogits into the chunk.  For the full vocabulary the kernels do
all the work (``rows.divergence_`` in ``torch_kernels/rows.py`` or ``kernels/rows.py``); a truncated
support is chosen, read and compared in ``objectives/truncated.py``.  Around either, this module
computes what they share: metrics of whole rows, the importance ratio, and the token clip.

Dimension key:  C rows in a chunk, W columns of a chunk's logits, K entries of the support
"""

from typing import NamedTuple

import torch
from torch import Tensor

from fused_sd.engine.chunk import Chunk, Objective
from fused_sd.objectives.truncated import SUPPORT_METRICS, TruncatedRows
from fused_sd.settings import setting
from fused_sd.terms.comparison import Comparison
from fused_sd.terms.ids import overlap
from fused_sd.terms.support import SideName
from fused_sd.terms.weighting import capped_ratio, clip_tokens
from fused_sd.torch_kernels.rows import ROW_METRICS, Compared, Normalizers, RowGradient

# metrics that read whole rows, or a sampled token's log-probability in them
WHOLE_METRICS = {
    *(*ROW_METRICS, *SUPPORT_METRICS, "top1_agreement", "topk_overlap"),
    *("student_log_prob", "teacher_log_prob"),
}


@setting
class DivergenceObjective(NamedTuple):
    """A divergence over a support, with its importance cap and its metrics.

    Attributes:
        comparison: what is compared; ``TokenIds`` are replaced by ``GivenEntries``, whose ids are
            the input ``entry_ids``.
        importance_cap: of the ratio that multiplies each token; None: no ratio.
        input_names: the per-token inputs in their order: ``entry_ids`` (C, K),
            ``teacher_log_probs`` (C, K), ``token_ids`` (C,), ``old_log_probs`` (C,).
        metrics: names of the metrics.
    """

    comparison: Comparison
    importance_cap: float | None = None
    input_names: tuple[str, ...] = ()
    metrics: tuple[str, ...] = ()

    @property
    def num_values(self) -> int:
        return 1

    @property
    def num_sparse_values(self) -> int:
        if self.comparison.remainder != "renormalize":
            return 0
        return self.comparison.support.num_entries

    @property
    def whole_sides(self) -> tuple[bool, bool]:
        support, remainder = self.comparison.support, self.comparison.remainder
        if WHOLE_METRICS.intersection(self.metrics):
            return True, True
        keeps_mass = remainder != "renormalize" or self.importance_cap is not None
        student = support.reads_whole("student") or keeps_mass
        teacher = support.reads_whole("teacher") or remainder in ("tail", "drop")
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
        if self.importance_cap is not None:  # read before any entry is masked or overwritten
            assert token_ids is not None
            sampled = chunk.part(chunk.student_side, token_ids[:, None])[:, 0]
        normalizers = self._observe(chunk, token_ids, metrics)
        rows: _FullRows | TruncatedRows
        if self.comparison.support.is_truncated:
            rows = TruncatedRows(self.comparison, chunk, inputs)
        else:
            assert normalizers is not None
            named = [name for name in self.metrics if name in ROW_METRICS]
            rows = _FullRows(self.comparison, chunk, normalizers, named)

        ratio: Tensor | None = None
        if sampled is not None and self.importance_cap is not None:
            [sampled] = chunk.shard.sum(sampled)
            log_prob = sampled - rows.student_normalizer()
            ratio, capped = capped_ratio(log_prob, inputs["old_log_probs"], self.importance_cap)
            metrics["importance_ratio"], metrics["importance_cap_fraction"] = ratio, capped
        row_weights = None
        if chunk.row_weights is not None:
            row_weights = chunk.row_weights[:, 0] * chunk.shaping.factor
            row_weights = row_weights if ratio is None else row_weights * ratio
        metrics |= rows.metrics(self.metrics)
        loss, is_unclipped = rows.loss_and_gradient_(row_weights)
        metrics |= rows.row_metrics()
        if "token_clip_fraction" in self.metrics:
            metrics["token_clip_fraction"] = 1 - is_unclipped
        if "entry_clip_fraction" in self.metrics:
            metrics["entry_clip_fraction"] = rows.entry_clip_fraction()
        values = loss if ratio is None else ratio * loss
        return values[:, None], [loss, *(metrics[name] for name in self.metrics)]

    def _observe(
        self, chunk: Chunk, token_ids: Tensor | None, metrics: dict[str, Tensor]
    ) -> Normalizers | None:
        """Add the metrics of whole rows, before logits are masked and overwritten.

        Returns:
            Both sides' normalisers, where the metrics or the full vocabulary need them.
        """
        wanted, rows, normalizers = set(self.metrics), chunk.functions.rows, None
        named = wanted.intersection(ROW_METRICS)
        names: tuple[SideName, SideName] = ("student", "teacher")
        labelled = [side for side in names if f"{side}_log_prob" in wanted]
        lse: dict[str, Tensor] = {}
        if chunk.teacher_side is None:
            if "student_entropy" in wanted:
                mine, part = rows.lse_and_entropy(chunk.student)
                [lse["student"]], [entropy], _ = chunk.shard.join([mine], entropies=[part])
                metrics["student_entropy"] = entropy
            elif labelled:
                lse["student"] = chunk.log_normalizer("student")
        elif named or labelled or not self.comparison.support.is_truncated:
            normalizers = rows.normalizers(*chunk.sides(), chunk.shard)
            lse = {"student": normalizers.student, "teacher": normalizers.teacher}
        for name in labelled:
            assert token_ids is not None
            [label] = chunk.shard.sum(chunk.part(chunk.side(name), token_ids[:, None])[:, 0])
            metrics[f"{name}_log_prob"] = label - lse[name]
        if chunk.teacher_side is None:
            return None
        if named and self.comparison.support.is_truncated:
            metrics |= rows.row_metrics(*chunk.sides(), normalizers, named)
        if "top1_agreement" in wanted:
            ids, other = (chunk.top_k(side, 1)[:, 0] for side in names)
            metrics["top1_agreement"] = (ids == other).to(chunk.student)
        if "topk_overlap" in wanted:
            chosen = [chunk.top_k(side, self.comparison.support.top_k) for side in names]
            metrics["topk_overlap"] = overlap(*chosen).to(chunk.student)
        return normalizers


class _FullRows:
    """Rows of which every entry of the vocabulary is compared."""

    def __init__(
        self, comparison: Comparison, chunk: Chunk, normalizers: Normalizers, names: list[str]
    ) -> None:
        self.comparison, self.chunk, self.normalizers = comparison, chunk, normalizers
        self.names = names  # metrics of whole rows, found by the loss's own passes
        self.compared: Compared | None = None
        self.num_entries: Tensor | None = None

    def student_normalizer(self) -> Tensor:
        return self.normalizers.student

    def metrics(self, names: tuple[str, ...]) -> dict[str, Tensor]:
        """Count the vocabulary where a metric needs it, before the gradient is written."""
        if "entry_clip_fraction" in names:
            [self.num_entries] = self.chunk.shard.sum((self.chunk.student > -torch.inf).sum(-1))
        return {}

    def row_metrics(self) -> dict[str, Tensor]:
        """The named metrics of whole rows, once the loss is known."""
        assert self.compared is not None
        return self.compared.metrics

    def entry_clip_fraction(self) -> Tensor:
        assert self.compared is not None
        assert self.num_entries is not None
        if self.compared.clipped is None:
            return torch.zeros_like(self.compared.loss)
        return self.compared.clipped / self.num_entries

    def loss_and_gradient_(self, row_weights: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return each token's loss, and 1 where the token clip left it unclipped.

        With ``row_weights``, also write the gradient.
        """
        chunk, comparison = self.chunk, self.comparison
        compare = chunk.functions.rows.divergence_
        given = *chunk.sides(), self.normalizers, comparison.term, comparison.entry_clip
        gradient = None
        if row_weights is not None:
            assert chunk.dlogits is not None
            gradient = RowGradient(row_weights, chunk.shaping.cap, chunk.dlogits)
        bounds = comparison.token_bounds
        # under a token clip the loss decides whether there is a gradient, so it must come first
        at_once = gradient if bounds is None else None
        self.compared = compare(*given, at_once, self.names)
        loss, is_unclipped = clip_tokens(self.compared.loss, bounds)
        if gradient is not None and bounds is not None:
            clipped = gradient._replace(row_weights=gradient.row_weights * is_unclipped)
            compare(*given, clipped)
        return loss, is_unclipped
