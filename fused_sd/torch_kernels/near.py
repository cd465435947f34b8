"""The divergences of ``divergence.py`` for rows whose sides are near each other, in place.

Where no log-ratio is large, the balanced form of every term is one expression without cases, and a
CPU evaluates it in the memory of its arguments, several times as fast as the general functions,
which choose between forms entry by entry.  A divergence that is not here takes the general way.

Dimension key:  R rows visited at a time, W columns
Symbols:        s student, t teacher, r = log s - log t, m the mixture
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

LARGEST = 60.0  # of a log-ratio: its exponential is far from overflow in fp32


class Block(NamedTuple):
    """Memory for some rows of both sides, and for what is made of them; each (R, W)."""

    s: Tensor
    t: Tensor
    r: Tensor
    one: Tensor
    other: Tensor

    def fill_(self, student: Tensor, teacher: Tensor, lse_s: Tensor, lse_t: Tensor) -> bool:
        """Log-probabilities in ``s`` and ``t``; then, if the sides are near, the probabilities.

        Returns:
            Whether they are near.  A GPU is not asked, since that would wait for it.
        """
        torch.sub(student, lse_s[:, None], out=self.s)
        torch.sub(teacher, lse_t[:, None], out=self.t)
        if self.r.is_cuda or self.r.numel() == 0:
            return False
        torch.sub(self.s, self.t, out=self.r)
        low, high = self.r.aminmax()
        if not (low >= -LARGEST and high <= LARGEST):  # nor where they are NaN
            return False
        self.s.exp_()
        self.t.exp_()
        return True


Form = Callable[[Block, float], tuple[Tensor, Tensor]]  # the term and dlog_s, in the block's memory


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


FORMS: dict[str, Form] = {
    "forward_kl": forward_kl,
    "reverse_kl": reverse_kl,
    "jsd": jsd,
    "mixed_kl": mixed_kl,
}


def clip_(
    block: Block, term: Tensor, dlog_s: Tensor, balance: float, clip: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Terms and derivatives cut as ``DivergenceTerm.clipped`` cuts them, and how many: (R,)."""
    shift = torch.sub(block.s, block.t, out=block.t).mul_(balance)
    room = shift.neg_().add_(clip)  # for the balanced term
    cut = torch.sub(term, room, out=block.r).gt_(0)
    torch.minimum(term, room, out=term)
    change = torch.mul(block.s, -balance, out=block.t).sub_(dlog_s)
    return term, dlog_s.addcmul_(cut, change), cut.sum(-1)
