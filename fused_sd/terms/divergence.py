"""The divergences: how two log-probabilities of one vocabulary entry become a term of the loss.

A divergence is a function ``(log_s, log_t, parameter) -> (term, dlog_s)`` of the student's and the
teacher's log-probability of an entry.  ``dlog_s`` is the derivative of the term that treats the
log_s of each entry as an independent variable, because log-softmax backward is the same for every
divergence: ``dlogit_v = dlog_s_v - s_v * sum_u dlog_s_u``.  Either log-probability may be -inf, and
both may (then r is NaN): an entry without mass has term 0 and derivative 0.

The functions return *balanced* terms.  Where both sides sum to 1, the plain term
``t (log t - log s)`` may be shifted by ``s - t``: the shift adds nothing to the sum, makes every
term non-negative and avoids cancellation, so that a KL of 1e-7 keeps its digits in fp32.  The
number ``balance`` undoes the shift where the sides do not sum to 1:
``plain term = balanced term + balance * (s - t)``.  Example: at s = 0.2, t = 0.3 the plain term of
KL(t||s) is 0.3 ln(0.3 / 0.2) = 0.1216 and its balanced term is 0.1216 + (0.2 - 0.3) = 0.0216, so
its balance is -1.

``DIVERGENCES`` is the one table of what the library knows of each divergence.  To add one: write
its function and its row here, its twin of the same name in ``kernels/divergence.py``, its
definition in ``reference.py`` and, for a fast CPU, its in-place form in ``torch_kernels/near.py``;
add its class to the alias ``Divergence`` and export it.  Checks, parsers, planner, trainers and
tests read the table.

Symbols: s student, t teacher, m the mixture, r = log s - log t.
"""

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from fused_sd import checks
from fused_sd.settings import setting


@setting
@dataclass(frozen=True)
class Jsd:
    """Generalised Jensen-Shannon divergence ``beta KL(t||m) + (1 - beta) KL(s||m)``.

    Args:
        beta: the teacher's weight in the mixture ``m = beta t + (1 - beta) s``, in the open
            interval (0, 1).  The divergence tends to 0 at both ends, where trainers that take
            ``beta=0`` or ``beta=1`` mean a KL: see ``generalized_jsd``.

    Reference:
        Agarwal et al., *On-Policy Distillation of Language Models* (GKD), arXiv 2306.13649, eq. 1.

    Examples:
        >>> import torch, fused_sd
        >>> (one, other), head = torch.randn(2, 4, 16), torch.randn(100, 16)
        >>> def jsd(student, teacher):
        ...     return fused_sd.divergence_loss(
        ...         student, head, teacher, head, divergence=fused_sd.Jsd(0.5), reduction="mean"
        ...     ).loss
        >>> torch.allclose(jsd(one, other), jsd(other, one))  # symmetric at 0.5, as no KL is
        True
    """

    beta: float = 0.5

    def __post_init__(self) -> None:
        if isinstance(self.beta, int | float) and self.beta in (0, 1):
            meant = "forward_kl" if self.beta == 0 else "reverse_kl"
            remedy = f'the divergence tends to 0 there: pass divergence="{meant}", the KL meant'
        else:
            remedy = "0.5 weighs both sides equally"
        checks.check_open_interval("beta", self.beta, remedy)


@setting
@dataclass(frozen=True)
class MixedKl:
    """``forward_weight * KL(t||s) + (1 - forward_weight) * KL(s||t)``, as in SD-Zero's code.

    Args:
        forward_weight: share of KL(t||s), in [0, 1].

    Examples:
        >>> import torch, fused_sd
        >>> (student, teacher), head = torch.randn(2, 4, 16), torch.randn(100, 16)
        >>> mixed, forward, reverse = (
        ...     fused_sd.gkd_loss(student, head, teacher, head, beta=divergence).loss
        ...     for divergence in (fused_sd.MixedKl(0.25), "forward_kl", "reverse_kl")
        ... )
        >>> torch.allclose(mixed, 0.25 * forward + 0.75 * reverse)
        True
    """

    forward_weight: float = 0.5

    def __post_init__(self) -> None:
        checks.check_unit_interval("forward_weight", self.forward_weight)


@setting
@dataclass(frozen=True)
class SkewKl:
    """Skew KL divergence ``KL(t || (1 - student_weight) t + student_weight s)``.

    It is finite everywhere, and its gradient is bounded where the student misses the teacher's
    mass, which KL(t||s) answers with an infinite loss.

    Args:
        student_weight: the student's weight in the mixture, in the open interval (0, 1).  1 would
            be KL(t||s), 0 nothing.  DistiLLM's alpha is the teacher's weight, 1 - student_weight;
            its default of 0.1 is the default here.

    Reference:
        Ko et al., *DistiLLM*, arXiv 2402.03898, eq. 4.

    Examples:
        >>> import math, torch, fused_sd
        >>> _ = torch.manual_seed(0)
        >>> student, teacher = torch.randn(2, 4, 16)
        >>> student, head = 9 * student, torch.randn(100, 16)
        >>> skew, plain = (
        ...     fused_sd.gkd_loss(student, head, teacher, head, beta=divergence).loss
        ...     for divergence in (fused_sd.SkewKl(0.9), "forward_kl")
        ... )
        >>> bool(skew < -math.log(0.1) < plain)  # its bound; a plain KL has none
        True
    """

    student_weight: float = 0.9

    def __post_init__(self) -> None:
        remedy = 'pass divergence="forward_kl" for the weight 1'
        checks.check_open_interval("student_weight", self.student_weight, remedy)


Divergence = str | Jsd | MixedKl | SkewKl  # a string names one that has no parameter
Term = Callable[[Tensor, Tensor, float], tuple[Tensor, Tensor]]


def excess(log_ratio: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """``(a - b) - b * log_ratio`` of ``log_ratio = log a - log b``: at least 0, and 0 at a = b."""
    near = b * (torch.expm1(log_ratio) - log_ratio)
    far = (a - b) - b * log_ratio
    return torch.where(b == 0, a, torch.where(log_ratio.abs() < 0.5, near, far))


def mixture_ratios(r: Tensor, teacher_weight: float) -> tuple[Tensor, Tensor]:
    """``log m - log s`` and ``log m - log t`` of ``m = teacher_weight t + (1 - teacher_weight) s``.

    Both are computed from the ratio of the mixture to the larger side, which is bounded.
    """
    larger_s = r >= 0
    weight = torch.where(larger_s, torch.full_like(r, teacher_weight), 1 - teacher_weight)
    change = weight * torch.expm1(-r.abs())
    # 1 + change would cancel where the mixture is almost the smaller side
    far = torch.log((1 - weight) + weight * torch.exp(-r.abs()))
    step = torch.where(change > -0.5, torch.log1p(change), far)
    return torch.where(larger_s, step, step - r), torch.where(larger_s, step + r, step)


def forward_kl(log_s: Tensor, log_t: Tensor, parameter: float) -> tuple[Tensor, Tensor]:
    """KL(t||s); ``parameter`` is not read."""
    s, t, r = log_s.exp(), log_t.exp(), log_s - log_t
    return excess(r, s, t), torch.where(r.abs() < 0.5, -s * torch.expm1(-r), s - t)


def reverse_kl(log_s: Tensor, log_t: Tensor, parameter: float) -> tuple[Tensor, Tensor]:
    """KL(s||t); ``parameter`` is not read."""
    s, t = log_s.exp(), log_t.exp()
    r = log_s - log_t
    return excess(-r, t, s), torch.where(s == 0, s, s * r)


def jsd(log_s: Tensor, log_t: Tensor, parameter: float) -> tuple[Tensor, Tensor]:
    """Generalised JSD; ``parameter`` is beta, the teacher's weight in the mixture."""
    s, t, r = log_s.exp(), log_t.exp(), log_s - log_t
    m = parameter * t + (1 - parameter) * s
    m_over_s, m_over_t = mixture_ratios(r, parameter)
    term = (1 - parameter) * excess(m_over_s, m, s) + parameter * excess(m_over_t, m, t)
    return term, torch.where(s == 0, s, -(1 - parameter) * s * m_over_s)


def mixed_kl(log_s: Tensor, log_t: Tensor, parameter: float) -> tuple[Tensor, Tensor]:
    """Weighted sum of both KLs; ``parameter`` is the weight of KL(t||s)."""
    forward, dforward = forward_kl(log_s, log_t, 0.0)
    reverse, dreverse = reverse_kl(log_s, log_t, 0.0)
    return (
        parameter * forward + (1 - parameter) * reverse,
        parameter * dforward + (1 - parameter) * dreverse,
    )


def skew_kl(log_s: Tensor, log_t: Tensor, parameter: float) -> tuple[Tensor, Tensor]:
    """Skew KL; ``parameter`` is the student's weight in the mixture."""
    s, t, r = log_s.exp(), log_t.exp(), log_s - log_t
    m = (1 - parameter) * t + parameter * s
    _, m_over_t = mixture_ratios(r, 1 - parameter)
    dlog_s = torch.where(s == 0, s, -parameter * s * torch.expm1(-m_over_t))
    return excess(m_over_t, m, t), dlog_s


def _zero(parameter: float) -> float:
    return 0.0


def _one(parameter: float) -> float:
    return 1.0


COMMON_REMAINDERS = ("tail", "renormalize", "drop")


class Definition(NamedTuple):
    """A row of the table: all that the library has to know of a divergence.

    Attributes:
        function: (log_s, log_t, parameter) -> (term, dlog_s); its name is the divergence's, here
            and in ``kernels/divergence.py``.
        balance: ``plain term = balanced term + balance * (s - t)``, as a function of the parameter.
        setting: the public class that carries the parameter; None: named by a string alone.
        parameter_name: the parameter's name in that class.
        remainders: what may become of the entries outside a truncated support.  A remainder that is
            not listed is refused, and with none listed every truncated support is: list it once
            the divergence has a meaning there.
        infinite_without: the sides ("student", "teacher") that make the divergence infinite where
            they lack an entry on which the other side has mass.
        share_of_mean_ratio: the factor c with ``sum_v dlog_s_v = c sum_v s_v r_v`` over the
            vocabulary (r = log s - log t), as a function of the parameter.  The kernels then need
            no pass over the row for that sum.  None: the sum has no such form, or you are not sure.
    """

    function: Term
    balance: Callable[[float], float] = _zero
    setting: type | None = None
    parameter_name: str = ""
    remainders: Collection[str] = ()
    infinite_without: Collection[str] = ()
    share_of_mean_ratio: Callable[[float], float] | None = None


DIVERGENCES: dict[str, Definition] = {
    "forward_kl": Definition(
        forward_kl,
        balance=lambda parameter: -1.0,
        remainders=(*COMMON_REMAINDERS, "teacher_renormalize"),
        infinite_without=("student",),
        share_of_mean_ratio=_zero,  # dlog_s is s - t
    ),
    "reverse_kl": Definition(
        reverse_kl,
        balance=_one,
        remainders=COMMON_REMAINDERS,
        infinite_without=("teacher",),
        share_of_mean_ratio=_one,  # dlog_s is s r
    ),
    "jsd": Definition(jsd, setting=Jsd, parameter_name="beta", remainders=COMMON_REMAINDERS),
    "mixed_kl": Definition(
        mixed_kl,
        balance=lambda forward_weight: 1 - 2 * forward_weight,
        setting=MixedKl,
        parameter_name="forward_weight",
        remainders=COMMON_REMAINDERS,
        infinite_without=("student", "teacher"),
        share_of_mean_ratio=lambda forward_weight: 1 - forward_weight,
    ),
    "skew_kl": Definition(
        skew_kl,
        balance=lambda student_weight: -student_weight,
        setting=SkewKl,
        parameter_name="student_weight",
        remainders=COMMON_REMAINDERS,
    ),
}
