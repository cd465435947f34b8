"""Fast CPU forms of the divergences, for rows whose sides are near each other.

Where no log-ratio is large, the balanced term of a divergence is one expression without cases.  A
CPU evaluates it in the memory of its arguments, several times as fast as the general functions of
``terms/divergence.py``, which choose between forms entry by entry.  A divergence that has no form
here is evaluated by its general function.

Dimension key:  R rows of a block, W columns
Symbols:        s student, t teacher, r = log s - log t, m the mixture
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from fused_sd.terms.divergence_term import DivergenceTerm

LARGEST = 60.0  # of a log-ratio: its exponential is far from overflow in fp32


class Block(NamedTuple):
    """Memory for some rows of both sides and for intermediate results, each (R, W)."""

    s: Tensor
    t: Tensor
    r: Tensor
    one: Tensor
    other: Tensor

    def fill_(self, student: Tensor, teacher: Tensor, lse_s: Tensor, lse_t: Tensor) -> None:
        """Write both sides' log-probabilities to ``s`` and ``t``.

        Args:
            student, teacher: logits of both sides.
            lse_s, lse_t: (R,) fp64, their log-sum-exps.
        """
        for logits, lse, out in ((student, lse_s, self.s), (teacher, lse_t, self.t)):
            rounded = lse.to(out.dtype)
            torch.sub(logits, rounded[:, None], out=out)
            out.sub_((lse - rounded).to(out.dtype)[:, None])

    def exponentiate_near_(self) -> bool:
        """If the sides are near, turn log-probabilities into probabilities, and write ``r``.

        Returns:
            Whether they are.  False on a GPU, where the question would wait for the device.
        """
        if self.r.is_cuda or self.r.numel() == 0:
            return False
        torch.sub(self.s, self.t, out=self.r)
        low, high = self.r.aminmax()
        if not (low >= -LARGEST and high <= LARGEST):  # nor where a log-ratio is NaN
            return False
        self.s.exp_()
        self.t.exp_()
        return True


# (block, parameter) -> (term, dlog_s).  A form may overwrite r, one and other.  At its end s and t
# must be intact, because clip_ and the gradient read them, and r must be free.
Form = Callable[[Block, float], tuple[Tensor, Tensor]]


def forward_kl(block: Block, parameter: float) -> tuple[Tensor, Tensor]:
    _, t, r, term, dlog_s = block
    torch.mul(torch.expm1(r, out=term), t, out=dlog_s)
    return term.sub_(r).mul_(t), dlog_s


def reverse_kl(block: Block, parameter: float) -> tuple[Tensor, Tensor]:
    s, _, r, term, dlog_s = block
    torch.neg(r, out=term).expm1_().add_(r).mul_(s)
    return term, torch.mul(s, r, out=dlog_s)


def jsd(block: Block, parameter: float) -> tuple[Tensor, Tensor]:
    s, t, r, from_s, log_m_over_s = block
    torch.neg(r, out=from_s).expm1_().mul_(parameter)  # m / s - 1
    torch.log1p(from_s, out=log_m_over_s)
    from_s.sub_(log_m_over_s).mul_(s).mul_(1 - parameter)
    log_m_over_t = r.add(log_m_over_s)
    from_t = r.expm1_().mul_(1 - parameter).sub_(log_m_over_t).mul_(t).mul_(parameter)
    return from_s.add_(from_t), log_m_over_s.mul_(s).mul_(parameter - 1)


def mixed_kl(block: Block, parameter: float) -> tuple[Tensor, Tensor]:
    reverse, dreverse = reverse_kl(block, 0.0)
    more = block.r.new_empty((2, *block.r.shape))
    forward, dforward = forward_kl(Block(block.s, block.t, block.r, *more), 0.0)
    term = forward.mul_(parameter).add_(reverse, alpha=1 - parameter)
    return term, dforward.mul_(parameter).add_(dreverse, alpha=1 - parameter)


def skew_kl(block: Block, parameter: float) -> tuple[Tensor, Tensor]:
    s, t, r, dlog_s, term = block
    torch.expm1(r, out=dlog_s).mul_(parameter)  # m / t - 1
    torch.log1p(dlog_s, out=term)
    torch.sub(dlog_s, term, out=term).mul_(t)
    torch.add(dlog_s, 1, out=r)
    return term, dlog_s.div_(r).mul_(s).mul_(parameter)


class FastForm(NamedTuple):
    """How a divergence is evaluated in place, and how much memory that takes."""

    evaluate: Form
    num_buffers: int  # matrices (R, W) held at once: the five of the block and those it allocates
    largest: float = 1.0  # parameter up to which a mixture keeps its digits


FORMS: dict[str, FastForm] = {
    "forward_kl": FastForm(forward_kl, 5),
    "reverse_kl": FastForm(reverse_kl, 5),
    "jsd": FastForm(jsd, 6, largest=0.98),
    "mixed_kl": FastForm(mixed_kl, 7),
    "skew_kl": FastForm(skew_kl, 5, largest=0.98),
}
GENERAL_BUFFERS = 16  # of a general function of ``terms/divergence.py``, roughly


def has_form(term: DivergenceTerm) -> bool:
    """Whether a divergence with its parameter has a form here."""
    form = FORMS.get(term.name)
    return form is not None and term.parameter <= form.largest


def num_buffers(term: DivergenceTerm) -> int:
    """How many matrices (R, W) of a block's rows a divergence holds at once on a CPU."""
    return FORMS[term.name].num_buffers if has_form(term) else GENERAL_BUFFERS


def clip_(
    block: Block, term: Tensor, dlog_s: Tensor, balance: float, clip: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Cut terms and derivatives as ``DivergenceTerm.clipped`` does, and count the cuts: (R,)."""
    shift = torch.sub(block.s, block.t, out=block.t).mul_(balance)
    largest = shift.neg_().add_(clip)  # that the balanced term may be
    cut = torch.sub(term, largest, out=block.r).gt_(0)
    torch.minimum(term, largest, out=term)
    change = torch.mul(block.s, -balance, out=block.t).sub_(dlog_s)
    return term, dlog_s.addcmul_(cut, change), cut.sum(-1)
