"""Is a provider right, and how far off: its loss and gradients against float64, before it is timed.

The provider runs the problem at its full size.  Its tokens are copies of a few, so that float64
logits of the few give the truth for all: every chunk and every row of the gradients is compared.
The timed tokens are put in their place afterwards.

Whether an error is one of rounding or of another loss is told by logits rounded to bf16, as most
implementations have them, on the same tokens.

Dimension key:  N tokens, K distinct tokens, D hidden size, V vocabulary
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from fused_sd.bench.problem import BY_TOKEN, PATCH_TOKENS, Problem
from fused_sd.measuring.realistic import slabs
from fused_sd.verify import truth
from fused_sd.verify.truth import Distance, Exact

DISTINCT = 64
# wrong is what is further off than this multiple of the worst error of rounded logits.  At a KL of
# 0.05 they are 8 % off in the gradients, and the reverse KL is 27 to 31 % off the forward one; a
# mixture of the two is told from neither, nor is the full JSD from that with a tail
ROUNDING_FACTOR = 2.0
LEAST_BOUND = 0.02  # where rounding the logits does next to nothing, gradients still have 16 bits

Definition = Callable[[ModuleType, Tensor, Tensor, Problem], Tensor]


class Errors(NamedTuple):
    """Relative errors: of the loss, signed, and of the gradients by norm.

    The loss's is of the mean absolute token loss, which does not vanish where advantages cancel.
    """

    loss_bias: float
    dhidden: float
    dweight: float | None  # None: the head is frozen

    def beyond(self, bound: float) -> list[str]:
        """What is not within the bound, in words; a NaN is within none."""
        named = zip(("loss", "dH", "dW"), self)
        return [f"{name} is off by {abs(e):.1%}" for name, e in named if e and not abs(e) <= bound]


def _by_token(name: str, **choices: object) -> Definition:
    """A definition that compares distributions."""
    return lambda reference, s, t, _: getattr(reference, name)(s, t, **choices)


def _surrogate(name: str, needs_teacher: bool) -> Definition:
    """A definition that reads the sampled token's log-probability."""

    def token_loss(reference: ModuleType, s: Tensor, t: Tensor, tokens: Problem) -> Tensor:
        sides = (s, t) if needs_teacher else (s,)
        log_probs = (reference.token_log_prob(side, tokens.token_ids) for side in sides)
        loss: Tensor = getattr(reference, name)(*log_probs, tokens.advantages, tokens.old_log_probs)
        return loss

    return token_loss


def _label(reference: ModuleType, s: Tensor, t: Tensor, tokens: Problem) -> Tensor:
    loss: Tensor = reference.cross_entropy(s, tokens.token_ids)
    return loss


DEFINITIONS: dict[str, Definition] = {
    "forward_kl": _by_token("gkd", beta=0.0),
    "reverse_kl": _by_token("gkd", beta=1.0),
    "jsd": _by_token("gkd", beta=0.5),
    "topk_tail": _by_token("sdpo"),
    "topk_renormalized": _by_token("sd_zero"),
    "cross_entropy": _label,
    "token_log_probs": _label,
    "grpo": _surrogate("grpo", needs_teacher=False),
    "rlsd": _surrogate("rlsd", needs_teacher=True),
}


@dataclass(frozen=True, eq=False)
class Truth:
    """What a provider must find on the copied tokens."""

    tokens: Tensor  # (N,) int64: what to fill the problem with
    distinct: Problem  # the K tokens that are copied
    copies: Tensor  # (K,) float64
    of_token: Tensor  # (N,) int64: which of the K each is, -1 for the masked
    exact: Exact  # dlogits of the K, each with the weight of all its copies
    bound: float  # of the errors; beyond it a provider computes something else


def find_truth(problem: Problem) -> Truth:
    """Choose the tokens that are copied, and compute their loss and gradients in float64."""
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
    """Of a loss and of the gradients that its backward left in the problem's leaves."""
    dhidden, dweight = problem.hidden.grad, problem.weight.grad
    assert dhidden is not None
    everywhere = torch.arange(len(found.tokens), device=found.tokens.device)
    parts = None if dweight is None else iter(dweight.split(truth.SLAB))
    return _errors(found, float(loss), everywhere, dhidden, parts)


def _errors(
    found: Truth, loss: float, at: Tensor, dhidden: Tensor, dweight: Iterator[Tensor] | None
) -> Errors:
    """Errors of the gradients at the tokens ``at`` (M,), (M, D), and by the head, in slabs."""
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
    """Some of the tokens, and the heads, detached."""
    chosen = {name: getattr(problem, name).detach()[index] for name in (*BY_TOKEN, "mask")}
    heads = {name: getattr(problem, name).detach() for name in ("weight", "teacher_weight")}
    return replace(problem, **chosen, **heads)


def _exact(distinct: Problem, copies: Tensor, student: Tensor, teacher: Tensor) -> Exact:
    """The mean over all copies on given logits."""
    definition, reference = DEFINITIONS[distinct.objective], truth.reference()

    def token_loss(leaf: Tensor, teacher: Tensor, rows: slice) -> Tensor:
        return definition(reference, leaf, teacher, _rows(distinct, rows))

    return truth.exact(token_loss, student, teacher, copies / copies.sum())
