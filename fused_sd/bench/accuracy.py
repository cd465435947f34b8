"""Errors of a provider's loss and gradients against float64, found before the provider is timed.

The provider runs the problem at its full size, on tokens that are copies of a few distinct ones.
float64 logits of the distinct tokens therefore give the truth for all tokens, and every chunk and
every row of the gradients is compared.  Afterwards the timed tokens replace the copies.

An error may come from rounding or from computing another loss.  The bound between the two is twice
the error of the definition itself on logits rounded to bf16, as most implementations have them.

Dimension key:  N tokens, K distinct tokens, D hidden size, V vocabulary
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from fused_sd import reference
from fused_sd.bench.problem import BY_TOKEN, PATCH_TOKENS, Problem
from fused_sd.measuring.realistic import slabs
from fused_sd.verify import truth
from fused_sd.verify.truth import Distance, Exact

DISTINCT = 64  # K
# A provider is wrong if its error exceeds this multiple of the worst error of rounded logits.  At a
# KL of 0.05 rounded logits change the gradients by 8 %; gradients of the reverse KL and of the
# forward KL differ by 27 to 31 %.  The bound cannot tell a mixture of the two from either, nor the
# full JSD from the JSD with a tail.
ROUNDING_FACTOR = 2.0
LEAST_BOUND = 0.02  # gradients have 16 bits even where rounding the logits changes little

# takes the student's and the teacher's logits (K, V), and the tokens; returns token losses (K,)
Definition = Callable[[Tensor, Tensor, Problem], Tensor]


class Errors(NamedTuple):
    """Relative errors: of the loss, signed, and of the gradients by norm.

    The loss's error is relative to the mean absolute token loss, which does not vanish if positive
    and negative advantages cancel.
    """

    loss_bias: float
    dhidden: float
    dweight: float | None  # None: the head is frozen

    def beyond(self, bound: float) -> list[str]:
        """Describe each error that exceeds the bound; a NaN exceeds every bound."""
        named = zip(("loss", "dH", "dW"), self)
        return [f"{name} is off by {abs(e):.1%}" for name, e in named if e and not abs(e) <= bound]


def _cross_entropy(s: Tensor, t: Tensor, tokens: Problem) -> Tensor:
    return reference.cross_entropy(s, tokens.token_ids)


def _grpo(s: Tensor, t: Tensor, tokens: Problem) -> Tensor:
    log_probs = reference.token_log_prob(s, tokens.token_ids)
    return reference.grpo(log_probs, tokens.advantages, tokens.old_log_probs)


def _rlsd(s: Tensor, t: Tensor, tokens: Problem) -> Tensor:
    student, teacher = (reference.token_log_prob(side, tokens.token_ids) for side in (s, t))
    return reference.rlsd(student, teacher, tokens.advantages, tokens.old_log_probs)


DEFINITIONS: dict[str, Definition] = {
    "forward_kl": lambda s, t, _: reference.gkd(s, t, beta=0.0),
    "reverse_kl": lambda s, t, _: reference.gkd(s, t, beta=1.0),
    "jsd": lambda s, t, _: reference.gkd(s, t, beta=0.5),
    "opsd": lambda s, t, _: reference.opsd(s, t),
    "topk_tail": lambda s, t, _: reference.sdpo(s, t),
    "topk_renormalized": lambda s, t, _: reference.sd_zero(s, t),
    "cross_entropy": _cross_entropy,
    "token_log_probs": _cross_entropy,
    "grpo": _grpo,
    "rlsd": _rlsd,
}


@dataclass(frozen=True, eq=False)
class Truth:
    """The exact loss and gradients on the copied tokens."""

    tokens: Tensor  # (N,) int64: indices of the tokens to fill the problem with
    distinct: Problem  # the K tokens that are copied
    copies: Tensor  # (K,) float64: number of copies of each
    of_token: Tensor  # (N,) int64: index into the K tokens, -1 for masked tokens
    exact: Exact  # dlogits of the K tokens, each with the weight of all its copies
    bound: float  # largest error of a provider that computes the right loss


def find_truth(problem: Problem) -> Truth:
    """Choose the tokens to copy, and compute their loss and gradients in float64."""
    at = torch.nonzero(problem.mask)[:, 0]
    count = min(DISTINCT, len(at))
    chosen = at[torch.arange(count, device=at.device) * len(at) // count]
    of_active = torch.arange(len(at), device=at.device) % count
    of_token = torch.full_like(problem.token_ids, -1)
    of_token[at] = of_active
    tokens = torch.arange(len(of_token), device=at.device)
    tokens[at] = chosen[of_active]
    copies = of_active.bincount(minlength=count).double()
    distinct = _rows(problem, chosen)
    sides = (distinct.hidden, distinct.teacher_hidden)
    heads = (distinct.weight, distinct.teacher_weight)
    exact = _exact(distinct, copies, *(truth.logits(h, w) for h, w in zip(sides, heads)))
    rounded = _exact(
        distinct,
        copies,
        *(truth.rounded_logits(h, w, torch.bfloat16) for h, w in zip(sides, heads)),
    )
    found = Truth(tokens, distinct, copies, of_token, exact, LEAST_BOUND)
    by_rounding = _errors(
        found,
        rounded.loss,
        at,
        (truth.hidden_gradient(rounded.dlogits, distinct.weight) / copies[:, None])[of_active],
        (part for _, part in truth.weight_gradient(rounded.dlogits, distinct.hidden)),
    )
    worst = max(abs(error or 0.0) for error in by_rounding)
    return replace(found, bound=max(LEAST_BOUND, ROUNDING_FACTOR * worst))


def errors(found: Truth, problem: Problem, loss: Tensor) -> Errors:
    """Errors of a loss, and of the gradients that its backward left in the problem's leaves."""
    dhidden, dweight = problem.hidden.grad, problem.weight.grad
    assert dhidden is not None
    everywhere = torch.arange(len(found.tokens), device=found.tokens.device)
    parts = None if dweight is None else iter(dweight.split(truth.SLAB))
    return _errors(found, float(loss), everywhere, dhidden, parts)


def _errors(
    found: Truth, loss: float, at: Tensor, dhidden: Tensor, dweight: Iterator[Tensor] | None
) -> Errors:
    """Errors of a loss and its gradients.

    Args:
        found: the truth.
        loss: the mean over the tokens that count.
        at: (M,) int64, tokens that ``dhidden`` has rows for.
        dhidden: (M, D).
        dweight: slabs of rows of (V, D); None: the head is frozen.
    """
    exact, by_hidden, by_weight = found.exact, Distance(), Distance()
    true_rows = truth.hidden_gradient(exact.dlogits, found.distinct.weight) / found.copies[:, None]
    for rows in slabs(len(at), PATCH_TOKENS):
        of = found.of_token[at[rows]]
        true = torch.where((of < 0)[:, None], 0.0, true_rows[of])
        by_hidden.add(dhidden[rows].double(), true)
    if dweight is not None:
        for (_, true), part in zip(
            truth.weight_gradient(exact.dlogits, found.distinct.hidden), dweight
        ):
            by_weight.add(part.double(), true)
    return Errors(
        (loss - exact.loss) / max(exact.size, 1e-30),
        by_hidden.by_norm(),
        None if dweight is None else by_weight.by_norm(),
    )


def _rows(problem: Problem, index: Tensor | slice) -> Problem:
    """Return a problem of some of the tokens, detached."""
    chosen = {name: getattr(problem, name).detach()[index] for name in (*BY_TOKEN, "mask")}
    heads = {name: getattr(problem, name).detach() for name in ("weight", "teacher_weight")}
    return replace(problem, **chosen, **heads)


def _exact(distinct: Problem, copies: Tensor, student: Tensor, teacher: Tensor) -> Exact:
    """The exact mean over all copies, on given logits (K, V)."""
    definition = DEFINITIONS[distinct.objective]

    def token_loss(leaf: Tensor, teacher: Tensor, rows: slice) -> Tensor:
        return definition(leaf, teacher, _rows(distinct, rows))

    return truth.exact(token_loss, student, teacher, copies / copies.sum())
