"""The objectives of the sampled token: log-probabilities of chosen entries, and losses of one.

Dimension key:  C rows in a chunk, K chosen entries of a row
"""

from typing import NamedTuple

import torch
from torch import Tensor

from fused_sd.engine.chunk import Chunk, Objective
from fused_sd.settings import setting
from fused_sd.terms.surrogate import Surrogate, cross_entropy, surrogate
from fused_sd.torch_kernels.rows import EntryGradient, log_probs


@setting
class LogProbObjective(NamedTuple):
    """Log-probabilities of K entries, and the log-mass of the others or the entropy.

    The per-token input is ``token_ids`` (C, K); the student's own top-k needs none.  The values are
    the K log-probabilities, then the tail's log-mass and the entropy, where they are asked for.
    """

    k: int
    is_top_k: bool
    tail: bool
    entropy: bool

    @property
    def num_values(self) -> int:
        return self.k + self.tail + self.entropy

    @property
    def num_sparse_values(self) -> int:
        return 0

    @property
    def whole_sides(self) -> tuple[bool, bool]:
        return True, False

    def extras(self) -> list[tuple[bool, tuple[int, ...]]]:
        return [(True, (self.k,))] if self.is_top_k else []

    def replay(self, extras: list[Tensor]) -> tuple[Objective, list[Tensor]]:
        """A second run reads the entries that the first one chose."""
        return self._replace(is_top_k=False), extras

    def __call__(self, chunk: Chunk) -> tuple[Tensor, list[Tensor]]:
        rows, logits = chunk.functions.rows, chunk.student
        ids = chunk.top_k("student", self.k) if self.is_top_k else chunk.inputs[0]
        part = chunk.part(chunk.student_side, ids)
        lse, *parts = _statistics(chunk, self.entropy)
        lses = [lse]
        if self.tail:
            logits.scatter_(1, chunk.columns_of(ids), -torch.inf)
            lses.append(rows.log_normalizer(logits))
        lses, entropies, [chosen] = chunk.shard.join(
            lses, entropies=parts, extra_sums=[part], dtype=logits.dtype
        )
        normalizer = lses[0]
        values = [log_probs(chosen, normalizer)]
        if self.tail:
            rest = lses[1]
            values.append((rest - normalizer).to(chosen.dtype)[:, None])
            normalizer = torch.where(rest == -torch.inf, 0, rest)
        values += [entropy[:, None] for entropy in entropies]
        result = torch.cat(values, -1)
        extras = [ids] if self.is_top_k else []
        if chunk.row_weights is not None:
            self._write_gradient_(chunk, ids, chosen, result, normalizer)
        return result, extras

    def _write_gradient_(
        self, chunk: Chunk, ids: Tensor, chosen: Tensor, values: Tensor, normalizer: Tensor
    ) -> None:
        """Write the gradient of ``sum(row_weights * values)``.

        ``entry_log_probs`` asks for a tail, ``token_log_probs`` and ``with_grad`` for an entropy;
        the last column is whichever was asked for.
        """
        assert not (self.tail and self.entropy)
        assert chunk.row_weights is not None
        row_weights = chunk.row_weights
        by_entry, log_prob = row_weights[:, : self.k], values[:, : self.k]
        total = row_weights[:, : self.k + self.tail].sum(-1, keepdim=True)
        constant, slope = -total[:, 0], None
        at_entries = by_entry - log_prob.exp() * total
        if self.tail:
            constant = row_weights[:, -1] - values[:, -1].exp() * total[:, 0]
        if self.entropy:
            slope = -row_weights[:, -1]
            constant = constant + slope * values[:, -1]
            at_entries = at_entries + log_prob.exp() * slope[:, None] * (log_prob + values[:, -1:])
        entries = EntryGradient(chunk.columns_of(ids), chosen, at_entries, None)
        chunk.write_gradient_(normalizer, constant, slope, entries)


def _statistics(chunk: Chunk, entropy: bool) -> tuple[Tensor, ...]:
    """Log-sum-exp of the student's rows and, where asked for, their entropy: (C,) each."""
    rows = chunk.functions.rows
    if entropy:
        return rows.lse_and_entropy(chunk.student)
    return (rows.log_normalizer(chunk.student),)


@setting
class TokenLossObjective(NamedTuple):
    """A loss of the sampled token's log-probability.

    The per-token inputs are listed by ``input_names``: ``token_ids`` (C,) and what the surrogate
    reads, each (C,).  For a teacher that is given by its hidden states, the teacher's
    log-probability is computed here and replaces the input ``teacher_log_probs``.
    """

    surrogate: Surrogate | None  # None: cross entropy
    input_names: tuple[str, ...]
    metrics: tuple[str, ...]

    @property
    def num_values(self) -> int:
        return 1

    @property
    def num_sparse_values(self) -> int:
        return 0

    @property
    def whole_sides(self) -> tuple[bool, bool]:
        return True, True

    def extras(self) -> list[tuple[bool, tuple[int, ...]]]:
        return [(False, ())] * len(self.metrics)

    def replay(self, extras: list[Tensor]) -> tuple[Objective, list[Tensor]]:
        return self, []

    def __call__(self, chunk: Chunk) -> tuple[Tensor, list[Tensor]]:
        rows = chunk.functions.rows
        inputs = dict(zip(self.input_names, chunk.inputs, strict=True))
        ids = inputs["token_ids"][:, None]
        wants_entropy = "student_entropy" in self.metrics
        lse, *parts = _statistics(chunk, wants_entropy)
        lses, labels = [lse], [chunk.part(chunk.student_side, ids)]
        if chunk.teacher_side is not None:
            lses.append(rows.log_normalizer(chunk.teacher))
            labels.append(chunk.part(chunk.teacher_side, ids))
        lses, entropies, labels = chunk.shard.join(
            lses, entropies=parts, extra_sums=labels, dtype=chunk.student.dtype
        )
        log_prob, *others = (
            log_probs(label, lse)[:, 0] for label, lse in zip(labels, lses, strict=True)
        )
        if others:
            inputs["teacher_log_probs"] = others[0]
        if self.surrogate is None:
            term = cross_entropy(log_prob)
        else:
            term = surrogate(self.surrogate, log_prob, inputs)
        metrics = {"student_log_prob": log_prob}
        if "teacher_log_probs" in inputs:
            metrics["teacher_log_prob"] = inputs["teacher_log_probs"]
        metrics |= term.metrics
        if wants_entropy:
            metrics["student_entropy"] = entropies[0]
        if chunk.row_weights is not None:
            coefficient = chunk.row_weights[:, 0] * term.dlog_prob
            at_token = (-coefficient * torch.expm1(log_prob))[:, None]
            entries = EntryGradient(chunk.columns_of(ids), labels[0], at_token, None)
            chunk.write_gradient_(lses[0], -coefficient, None, entries)
        return term.loss[:, None], [metrics[name] for name in self.metrics]
