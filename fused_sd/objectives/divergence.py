"""The objective of every divergence: a chunk's logits of both sides become losses and gradients.

The chunk loop calls the objective with a ``Chunk`` (``engine/chunk.py``); the objective returns
token losses and metrics, and writes dlogits into the chunk.  For the full vocabulary the kernels do
all the work (``rows.divergence_`` in ``torch_kernels/rows.py`` or ``kernels/rows.py``); a truncated
support is chosen, read and compared in ``objectives/truncated.py``.  Around either, this module
computes what they share: metrics of whole rows, the importance ratio, and the token clip.

Dimension key:  C rows in a chunk, W columns of a chunk's logits, K entries of the support
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fused_sd.engine.chunk import Chunk, Objective
from fused_sd.objectives.truncated import SUPPORT_METRICS, TruncatedRows
from fused_sd.settings import setting
from fused_sd.terms.comparison import Comparison
from fused_sd.terms.ids import overlap
from fused_sd.terms.support import SIDES, SideName
from fused_sd.terms.weighting import capped_ratio, clip_tokens
from fused_sd.torch_kernels.rows import ROW_METRICS, RowGradient

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
        # what reads single logits comes before any of them is masked or overwritten
        labels = self._labels(chunk, inputs.get("token_ids"))
        metrics = self._agreement(chunk)
        if chunk.teacher_side is None and "student_entropy" in self.metrics:
            lse, part = chunk.functions.rows.lse_and_entropy(chunk.student)
            [metrics["student_entropy"]] = chunk.shard.join(
                [lse], entropies=[part], dtype=part.dtype
            ).entropies
        rows: _FullRows | TruncatedRows
        if self.comparison.support.is_truncated:
            rows = TruncatedRows(self.comparison, chunk, inputs)
        else:
            with_largest = "top1_agreement" in self.metrics and "top1_agreement" not in metrics
            rows = _FullRows(self.comparison, chunk, with_largest)
        log_probs = {
            side: (label - rows.normalizer(side)).to(label.dtype) for side, label in labels.items()
        }
        metrics |= {f"{side}_log_prob": value for side, value in log_probs.items()}

        ratio: Tensor | None = None
        if self.importance_cap is not None:
            old = inputs["old_log_probs"]
            ratio, capped = capped_ratio(log_probs["student"], old, self.importance_cap)
            metrics["importance_ratio"], metrics["importance_cap_fraction"] = ratio, capped
        row_weights = None
        if chunk.row_weights is not None:
            row_weights = chunk.row_weights[:, 0]
            row_weights = row_weights if ratio is None else row_weights * ratio
        named = [name for name in self.metrics if name not in metrics]
        loss, found = rows.loss_and_gradient_(row_weights, named)
        metrics |= found
        values = loss if ratio is None else ratio * loss
        return values[:, None], [loss, *(metrics[name] for name in self.metrics)]

    def _labels(self, chunk: Chunk, token_ids: Tensor | None) -> dict[SideName, Tensor]:
        """The sampled tokens' logits (C,) on the sides whose log-probabilities are needed."""
        needed = [side for side in SIDES if f"{side}_log_prob" in self.metrics]
        if self.importance_cap is not None and "student" not in needed:
            needed.append("student")
        if not needed:
            return {}
        assert token_ids is not None
        parts = [chunk.part(chunk.side(side), token_ids[:, None])[:, 0] for side in needed]
        return dict(zip(needed, chunk.shard.sum(*parts), strict=True))

    def _agreement(self, chunk: Chunk) -> dict[str, Tensor]:
        """How far the sides' largest entries agree; a support's own top-k is used again."""
        found = {}
        if "topk_overlap" in self.metrics:
            chosen = [chunk.top_k(side, self.comparison.support.top_k) for side in SIDES]
            found["topk_overlap"] = overlap(*chosen).to(chunk.student)
        # whole rows of one rank are searched where they are normalised
        if "top1_agreement" in self.metrics and (
            self.comparison.support.is_truncated or not chunk.shard.alone
        ):
            for side in SIDES:  # a support's top-k begins with the largest
                if self.comparison.support.chooses(side):
                    chunk.top_k(side, self.comparison.support.top_k)
            ids, other = (chunk.top_k(side, 1)[:, 0] for side in SIDES)
            found["top1_agreement"] = (ids == other).to(chunk.student)
        return found


class _FullRows:
    """Rows of which every entry of the vocabulary is compared."""

    def __init__(self, comparison: Comparison, chunk: Chunk, with_largest: bool) -> None:
        self.comparison, self.chunk = comparison, chunk
        normalize = chunk.functions.rows.normalizers
        self.normalizers = normalize(*chunk.sides(), chunk.shard, with_largest)

    def normalizer(self, side: SideName) -> Tensor:
        """Log-sum-exp (C,) of a side's rows."""
        lse: Tensor = getattr(self.normalizers, side)
        return lse

    def loss_and_gradient_(
        self, row_weights: Tensor | None, names: Sequence[str]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return each token's loss and named metrics; with ``row_weights``, write the gradient.

        The passes that find the loss find the metrics of whole rows too.
        """
        chunk, comparison = self.chunk, self.comparison
        compare = chunk.functions.rows.divergence_
        given = *chunk.sides(), self.normalizers, comparison.term, comparison.entry_clip
        num_entries = None
        if "entry_clip_fraction" in names:  # counted before the gradient is written
            [num_entries] = chunk.shard.sum((chunk.student > -torch.inf).sum(-1))
        gradient = None
        if row_weights is not None:
            assert chunk.dlogits is not None
            gradient = RowGradient(row_weights, chunk.cap, chunk.dlogits)
        bounds = comparison.token_bounds
        # under a token clip the loss decides whether there is a gradient, so it must come first
        at_once = gradient if bounds is None else None
        loss, clipped, found = compare(
            *given, at_once, [name for name in names if name in ROW_METRICS]
        )
        if self.normalizers.largest is not None:
            one, other = self.normalizers.largest.unbind(1)
            found["top1_agreement"] = (one == other).to(loss)
        if num_entries is not None:
            found["entry_clip_fraction"] = clipped / num_entries
        if bounds is not None:
            loss, is_unclipped = clip_tokens(loss, bounds)
            found["token_clip_fraction"] = 1 - is_unclipped
            if gradient is not None:
                compare(*given, gradient._replace(row_weights=gradient.row_weights * is_unclipped))
        return loss, found
