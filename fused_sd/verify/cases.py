"""The losses that ``fused_sd verify`` runs: each one's fused call, and its definition.

Dimension key:  N tokens, D hidden size, V vocabulary
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

import fused_sd
from fused_sd import reference
from fused_sd.engine.options import LossOptions
from fused_sd.losses.output import LossOutput
from fused_sd.terms.divergence import Divergence
from fused_sd.verify.inputs import Operands


class Logits(NamedTuple):
    """float64 logits that a definition is applied to."""

    student: Tensor  # (N, V)
    teacher: Tensor  # (N, V)
    support: Tensor | None  # (N, V) bool, the compared entries; None: all


Fused = Callable[[Operands, LossOptions], LossOutput]
Definition = Callable[[Logits, Operands], Tensor]  # returns the token losses (N,)


@dataclass(frozen=True)
class Case:
    """A loss and its definition.

    Attributes:
        name: the loss, as ``--losses`` names it.
        fused: calls the library, with the mean as the reduction.
        definition: computes the token losses (N,) with the functions of ``reference.py``.
        against: what the student is compared with.  "distribution": a teacher's, so that the loss
            is measured at several KLs.  "evidence": a teacher's log-probability of one token, also
            at several KLs.  "nothing": no teacher, so that the loss is measured once.
        chooser: the side whose top-k is the support; None: the whole vocabulary.
        k: number of entries of the support.
        has_sparse: whether the loss takes ``gradient="sparse"``.
    """

    name: str
    fused: Fused
    definition: Definition
    against: Literal["distribution", "evidence", "nothing"] = "distribution"
    chooser: Literal["student", "teacher"] | None = None
    k: int = 0
    has_sparse: bool = True

    def entries(self, vocab: int) -> int:
        """Number of entries of the support: k, or half of a small vocabulary."""
        return min(self.k, vocab // 2)


def token_weights(case: Case, operands: Operands) -> Tensor:
    """Return float64 weights (N,): the loss is the token losses' sum with these weights."""
    weights = operands.token_weights.double()
    if case.definition is not _rlcsd_definition:
        return weights / weights.sum()
    _, selected = reference.rlcsd_advantages(*_hints(operands))
    total = torch.zeros_like(weights)
    for part in (weights * selected, weights * ~selected):
        total += part / (part != 0).sum().clamp(min=1)
    return total


def mean_divisor(case: Case, operands: Operands) -> Tensor:
    """Return the divisor () of the mean, which a certificate does not include."""
    total = operands.token_weights.sum()
    return torch.ones_like(total) if case.definition is _rlcsd_definition else total


def _hints(operands: Operands) -> tuple[Tensor, Tensor, Tensor]:
    return operands.advantages, operands.correct_log_probs, operands.wrong_log_probs


def _sides(operands: Operands) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return operands.hidden, operands.weight, operands.teacher, operands.weight.detach()


def _sampled(operands: Operands) -> tuple[Tensor, Tensor, Tensor]:
    return operands.hidden, operands.weight, operands.token_ids


def _sides_log_probs(logits: Logits, operands: Operands) -> tuple[Tensor, Tensor]:
    """Log-probabilities of the sampled tokens: student's and teacher's."""
    student, teacher = (
        reference.token_log_prob(side, operands.token_ids)
        for side in (logits.student, logits.teacher)
    )
    return student, teacher


def _generic(name: str, divergence: Divergence, definition: str) -> Case:
    """Return the case of a divergence over the whole vocabulary, without a method's settings."""
    return Case(
        name,
        lambda o, run: fused_sd.divergence_loss(*_sides(o), divergence=divergence, **run),
        lambda z, o: reference.divergence(z.student, z.teacher, divergence=definition, beta=0.5),
    )


def _sdpo(operands: Operands, run: LossOptions) -> LossOutput:
    return fused_sd.sdpo_loss(
        *_sides(operands),
        top_k=CASES["sdpo"].entries(operands.vocab),
        token_ids=operands.token_ids,
        old_log_probs=operands.old_log_probs,
        **run,
    )


def _sdpo_definition(logits: Logits, operands: Operands) -> Tensor:
    student, teacher, support = logits
    loss = reference.gkd(student, teacher, beta=0.5, support=support)
    log_prob = reference.token_log_prob(student, operands.token_ids)
    return loss * reference.importance(log_prob, operands.old_log_probs, 2.0)


def _sd_zero(operands: Operands, run: LossOptions) -> LossOutput:
    top_k = CASES["sd_zero"].entries(operands.vocab)
    return fused_sd.sd_zero_loss(*_sides(operands), top_k=top_k, **run)


def _sd_zero_definition(logits: Logits, operands: Operands) -> Tensor:
    return reference.divergence(
        logits.student,
        logits.teacher,
        divergence="mixed_kl",
        support=logits.support,
        remainder="renormalize",
    )


def _rlsd(operands: Operands, run: LossOptions) -> LossOutput:
    return fused_sd.rlsd_loss(
        *_sampled(operands),
        operands.advantages,
        teacher_hidden=operands.teacher,
        teacher_head=operands.weight.detach(),
        old_log_probs=operands.old_log_probs,
        **run,
    )


def _rlsd_definition(logits: Logits, operands: Operands) -> Tensor:
    student, teacher = _sides_log_probs(logits, operands)
    return reference.rlsd(student, teacher, operands.advantages, operands.old_log_probs)


def _rlcsd(operands: Operands, run: LossOptions) -> LossOutput:
    choices: Any = {name: value for name, value in run.items() if name != "reduction"}
    return fused_sd.rlcsd_loss(  # no reduction: its two means are token weights
        *_sampled(operands),
        *_hints(operands),
        old_log_probs=operands.old_log_probs,
        **choices,
    )


def _rlcsd_definition(logits: Logits, operands: Operands) -> Tensor:
    log_prob = reference.token_log_prob(logits.student, operands.token_ids)
    return reference.rlcsd(log_prob, *_hints(operands), operands.old_log_probs)


def _sampled_kl(operands: Operands, run: LossOptions) -> LossOutput:
    head = operands.weight.detach()
    teacher: Any = {"teacher_hidden": operands.teacher, "teacher_head": head}
    return fused_sd.sampled_kl_loss(*_sampled(operands), **teacher, **run)


def _sampled_kl_definition(logits: Logits, operands: Operands) -> Tensor:
    student, teacher = _sides_log_probs(logits, operands)
    return reference.sampled_k1(student, teacher)


def _grpo(operands: Operands, run: LossOptions) -> LossOutput:
    old = operands.old_log_probs
    return fused_sd.grpo_loss(*_sampled(operands), operands.advantages, old_log_probs=old, **run)


def _grpo_definition(logits: Logits, operands: Operands) -> Tensor:
    log_prob = reference.token_log_prob(logits.student, operands.token_ids)
    return reference.grpo(log_prob, operands.advantages, operands.old_log_probs)


def _cross_entropy(operands: Operands, run: LossOptions) -> LossOutput:
    choices: Any = {name: value for name, value in run.items() if name != "teacher_temperature"}
    return fused_sd.cross_entropy_loss(
        *_sampled(operands),
        **choices,
    )


def _token_log_probs(operands: Operands, run: LossOptions) -> LossOutput:
    choices: Any = {name: run[name] for name in ("token_weights", "compact", "backend")}
    log_probs = fused_sd.token_log_probs(*_sampled(operands), **choices).log_probs
    weights = operands.token_weights
    loss = -(weights * log_probs).sum() / weights.sum()
    return LossOutput(loss, -log_probs.detach(), {})


_ALL = (
    Case("sdpo", _sdpo, _sdpo_definition, chooser="student", k=100),
    Case("sd_zero", _sd_zero, _sd_zero_definition, chooser="teacher", k=64),
    Case(
        "sd_zero_paper",
        lambda o, run: fused_sd.sd_zero_loss(*_sides(o), variant="paper", **run),
        lambda z, o: reference.sd_zero_paper(z.student, z.teacher),
    ),
    Case(
        "opsd",
        lambda o, run: fused_sd.opsd_loss(*_sides(o), **run),
        lambda z, o: reference.opsd(z.student, z.teacher),
    ),
    Case(
        "sdft",
        lambda o, run: fused_sd.sdft_loss(*_sides(o), **run),
        lambda z, o: reference.sdft(z.student, z.teacher),
    ),
    Case(
        "gkd",
        lambda o, run: fused_sd.gkd_loss(*_sides(o), **run),
        lambda z, o: reference.gkd(z.student, z.teacher),
    ),
    Case("rlsd", _rlsd, _rlsd_definition, against="evidence"),
    Case("rlcsd", _rlcsd, _rlcsd_definition, against="nothing"),
    Case("sampled_kl", _sampled_kl, _sampled_kl_definition, against="evidence"),
    Case("grpo", _grpo, _grpo_definition, against="nothing"),
    Case(
        "cross_entropy",
        _cross_entropy,
        lambda z, o: reference.cross_entropy(z.student, o.token_ids),
        against="nothing",
    ),
    Case(
        "token_log_probs",
        _token_log_probs,
        lambda z, o: reference.cross_entropy(z.student, o.token_ids),
        against="nothing",
        has_sparse=False,
    ),
    _generic("forward_kl", "forward_kl", "forward_kl"),
    _generic("reverse_kl", "reverse_kl", "reverse_kl"),
    _generic("jsd", fused_sd.Jsd(0.5), "jsd"),
)
CASES = {case.name: case for case in _ALL}
