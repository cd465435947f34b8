"""How two log-probabilities become a term of the loss: the divergences.

A divergence is a function ``(log_s, log_t, parameter) -> (term, dlog_s)`` of the student's and the
teacher's log-probabilities of one vocabulary entry, with ``dlog_s`` the derivative of the term as
if ``log_s`` were free.  Log-softmax backward is then common to all of them:
``dlogit_v = dlog_s_v - s_v * sum_u dlog_s_u``.  ``kernels/divergence.py`` holds the same functions,
under the same names and in the same order, for Triton.

The terms are *balanced*: where both sides sum to 1 the plain term ``t (log t - log s)`` may be
shifted by ``s - t``, which adds nothing to the sum and makes every term non-negative and free of
cancellation, so that a KL of 1e-7 keeps its digits in fp32.  ``balance`` undoes the shift where the
sides do not sum to 1 (``plain = balanced + balance (s - t)``).

Symbols: s student, t teacher, m = beta t + (1 - beta) s the mixture, r = log s - log t.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from fused_sd import checks
from fused_sd.settings import setting


@dataclass(frozen=True)
class Jsd:
    """Generalised Jensen-Shannon divergence ``beta KL(t||m) + (1 - beta) KL(s||m)``.

    Args:
        beta: weight of the teacher in the mixture, in the open interval (0, 1).  The divergence
            tends to 0 at both ends, where trainers that take ``beta=0`` or ``beta=1`` mean a KL.

    Reference:
        Agarwal et al., *On-Policy Distillation of Language Models* (GKD), arXiv 2306.13649, eq. 1.
    """

    beta: float = 0.5

    def __post_init__(self) -> None:
        checks.check_beta(self.beta)


@dataclass(frozen=True)
class MixedKl:
    """``forward_weight * KL(t||s) + (1 - forward_weight) * KL(s||t)``, as in SD-Zero's code."""

    forward_weight: float = 0.5

    def __post_init__(self) -> None:
        checks.check_unit_interval("forward_weight", self.forward_weight)


Divergence = str | Jsd | MixedKl  # "forward_kl", "reverse_kl", Jsd(beta), MixedKl(forward_weight)
Term = Callable[[Tensor, Tensor, float], tuple[Tensor, Tensor]]


def excess(log_ratio: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """``(a - b) - b * log_ratio`` of ``log_ratio = log a - log b``: at least 0, and 0 at a = b."""
    near = b * (torch.expm1(log_ratio) - log_ratio)
    far = (a - b) - b * log_ratio
    return torch.where(b == 0, a, torch.where(log_ratio.abs() < 0.5, near, far))


def forward_kl(log_s: Tensor, log_t: Tensor, parameter: float) -> tuple[Tensor, Tensor]:
    """KL(t||s); ``parameter`` is unused."""
    s, t, r = log_s.exp(), log_t.exp(), log_s - log_t
    return excess(r, s, t), torch.where(r.abs() < 0.5, -s * torch.expm1(-r), s - t)


def reverse_kl(log_s: Tensor, log_t: Tensor, parameter: float) -> tuple[Tensor, Tensor]:
    """KL(s||t); ``parameter`` is unused."""
    s, t = log_s.exp(), log_t.exp()
    r = log_s - log_t
    return excess(-r, t, s), torch.where(s == 0, s, s * r)


def jsd(log_s: Tensor, log_t: Tensor, parameter: float) -> tuple[Tensor, Tensor]:
    """Generalised JSD; ``parameter`` is beta, the teacher's weight in the mixture."""
    s, t, r = log_s.exp(), log_t.exp(), log_s - log_t
    m = parameter * t + (1 - parameter) * s
    larger_s = r >= 0
    # log m relative to the larger side, whose ratio to the mixture is bounded
    weight = torch.where(larger_s, torch.full_like(r, parameter), 1 - parameter)
    step = torch.log1p(weight * torch.expm1(-r.abs()))
    m_over_s = torch.where(larger_s, step, step - r)
    m_over_t = torch.where(larger_s, step + r, step)
    term = (1 - parameter) * excess(m_over_s, m, s) + parameter * excess(m_over_t, m, t)
    return term, torch.where(s == 0, s, -(1 - parameter) * s * m_over_s)


def mixed_kl(log_s: Tensor, log_t: Tensor, parameter: float) -> tuple[Tensor, Tensor]:
    """Weighted sum of both KLs; ``parameter`` is the weight of the forward KL."""
    forward, dforward = forward_kl(log_s, log_t, 0.0)
    reverse, dreverse = reverse_kl(log_s, log_t, 0.0)
    return (
        parameter * forward + (1 - parameter) * reverse,
        parameter * dforward + (1 - parameter) * dreverse,
    )


@setting
class DivergenceTerm(NamedTuple):
    """A divergence as the row functions take it.

    Attributes:
        name: of the function here and of its twin in ``kernels/divergence.py``.
        parameter: handed to the function.
        balance: ``plain term = balanced term + balance * (s - t)``.
    """

    name: str
    parameter: float
    balance: float

    @property
    def function(self) -> Term:
        return _TERMS[self.name]

    def plain(self, log_s: Tensor, log_t: Tensor) -> tuple[Tensor, Tensor]:
        """The term as the papers write it, for sides that need not sum to 1."""
        term, dlog_s = self.function(log_s, log_t, self.parameter)
        if self.balance == 0:
            return term, dlog_s
        s = log_s.exp()
        return term + self.balance * (s - log_t.exp()), dlog_s + self.balance * s

    def clipped(self, log_s: Tensor, log_t: Tensor, clip: float) -> tuple[Tensor, Tensor, Tensor]:
        """The plain term cut at ``clip``, for sides that sum to 1, and which entries were cut.

        ``balance (s - t)`` sums to 0 over all entries, so what the uncut entries have of it is
        minus what the cut ones have: those carry it, and the others keep the balanced term.
        """
        term, dlog_s = self.function(log_s, log_t, self.parameter)
        s = log_s.exp()
        shift = self.balance * (s - log_t.exp())
        cut = term + shift > clip
        return (
            torch.where(cut, clip - shift, term),
            torch.where(cut, -self.balance * s, dlog_s),
            cut,
        )


_TERMS: dict[str, Term] = {
    "forward_kl": forward_kl,
    "reverse_kl": reverse_kl,
    "jsd": jsd,
    "mixed_kl": mixed_kl,
}


def divergence_term(divergence: Divergence) -> DivergenceTerm:
    """The row functions' view of a divergence given by a caller."""
    if isinstance(divergence, Jsd):
        return DivergenceTerm("jsd", divergence.beta, 0.0)
    if isinstance(divergence, MixedKl):
        weight = divergence.forward_weight
        return DivergenceTerm("mixed_kl", weight, 1 - 2 * weight)
    checks.check_divergence_name(divergence)
    return DivergenceTerm(divergence, 0.0, -1.0 if divergence == "forward_kl" else 1.0)


def generalized_jsd(beta: float) -> Divergence:
    """The divergence trainers mean by ``beta``: the KLs at the end points, ``Jsd(beta)`` between.

    GKD's ``beta`` and SDPO's ``alpha`` jump at 0 and 1: 0 is KL(t||s) and 1 is KL(s||t), while the
    formula between them tends to 0 at both ends.
    """
    if beta == 0:
        return "forward_kl"
    return "reverse_kl" if beta == 1 else Jsd(beta)
