"""What must hold between two calls of the library, whatever the loss: no definition is needed.

Each relation changes a drawn problem in a way that tells what becomes of its result.  Both are
computed in float64 and may differ by the order of sums.
"""

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from fuzz_losses import Outcome, arguments, upstream
from fuzz_problem import Problem, Tensors, draw
from torch import Tensor

import fused_sd
from fused_sd import FULL_VOCABULARY, LMHead

SLACK = 1e-9  # of the largest number, in float64


@dataclass
class Change:
    """How a relation changes the second call.

    Attributes:
        order: The tokens of the call, by their number in the problem; None: all of them.
        factor: What it multiplies the token weights by.
        masked: Places in ``order`` whose token weight becomes 0.
        rows: Rows of padding behind both heads.
        shift: A constant that is added to the student's bias.
        options: Options of the call that it replaces.
    """

    order: Tensor | None = None
    factor: float = 1.0
    masked: Tensor | None = None
    rows: int = 0
    shift: float = 0.0
    options: dict[str, Any] | None = None


def run(p: Problem, change: Change) -> Outcome:
    """Call the loss; its result is per token, and its gradients with respect to the leaves."""
    t = Tensors(p, torch.float64)
    n = p.num_tokens
    order = torch.arange(n) if change.order is None else change.order
    shape = p.tokens
    t.hidden = t.hidden.reshape(n, p.hidden_size)[order]
    t.teacher_hidden = t.teacher_hidden.reshape(n, t.teacher_hidden.shape[-1])[order]
    for name, value in t.more.items():
        t.more[name] = value.reshape((n, *value.shape[len(shape) :]))[order]
    if t.token_weights is not None or change.factor != 1 or change.masked is not None:
        weights = torch.ones(shape) if t.token_weights is None else t.token_weights
        t.token_weights = weights.reshape(n)[order].double() * change.factor
        if change.masked is not None:
            t.token_weights[change.masked] = 0.0
    changed = replace(p, tokens=(len(order),))
    given, named = arguments(changed, t)
    named |= change.options or {}
    if change.rows or change.shift:
        student, teacher = t.heads()
        student, teacher = padded(student, change), padded(teacher, replace(change, shift=0.0))
        teacher = replace(teacher, bias=None if teacher.bias is None else teacher.bias.detach())
        given = (given[0], student, *given[2:])
        if "teacher_head" in named:
            named["teacher_head"] = teacher
        elif len(given) == 4 and isinstance(given[3], LMHead):
            given = (*given[:3], teacher)
    output = getattr(fused_sd, p.loss)(*given, **named)
    if p.loss == "token_log_probs":
        loss, tokens = output.log_probs, output.log_probs
    elif p.loss == "entry_log_probs":
        loss, tokens = output.log_probs.sum(-1), output.log_probs
    else:
        loss, tokens = output.loss, output.token_loss
    found = {"loss": loss.detach(), "tokens": tokens.detach()}
    wanted = {name: leaf for name, leaf in t.leaves.items() if leaf.requires_grad}
    if wanted:
        factors = 1.0
        if loss.dim():
            factors = upstream(p, torch.zeros(n))[order].double()
        scaled = (loss * factors).sum()
        made = torch.autograd.grad(scaled, list(wanted.values()), materialize_grads=True)
        found |= dict(zip(wanted, made))
        found["loss"] = scaled.detach()
    return found


def padded(head: LMHead, change: Change) -> LMHead:
    """A head with rows of garbage behind it, or with a bias that adds a constant."""
    weight, bias = head.weight, head.bias
    if change.shift:
        constant = torch.full((weight.shape[0],), change.shift, dtype=weight.dtype)
        bias = constant if bias is None else bias + constant
    if change.rows:
        weight = torch.cat([weight, torch.full((change.rows, weight.shape[1]), 7.0).to(weight)])
        if bias is not None:
            bias = torch.cat([bias, torch.full((change.rows,), 9.0).to(bias)])
    valid = head.valid_vocab or head.weight.shape[0]
    return replace(head, weight=weight, bias=bias, valid_vocab=valid)


# ------------------------------------------------------------------------------- the relations


def permutation(p: Problem, r: random.Random) -> Iterator[str]:
    """Tokens in another order have the same losses in that order, and the same gradients."""
    order = torch.tensor(r.sample(range(p.num_tokens), p.num_tokens), dtype=torch.int64)
    one, other = run(p, Change()), run(p, Change(order=order))
    one["tokens"] = one["tokens"][order]
    yield from differences(one, other)


def chunks(p: Problem, r: random.Random) -> Iterator[str]:
    """Neither the number of tokens at a time nor leaving masked ones out changes anything."""
    options = {"chunk_size": r.randint(1, 4), "compact": r.random() < 0.5}
    yield from differences(run(p, Change()), run(p, Change(options=options)))


def scaling(p: Problem, r: random.Random) -> Iterator[str]:
    """The loss is linear in the token weights, its mean does not depend on their scale."""
    if p.loss in ("rlcsd_loss", "token_log_probs", "entry_log_probs"):
        return
    factor = r.choice([2.5, 0.3] if p.options["reduction"] == "mean" else [2.5, 0.3, -1.5])
    one, other = run(p, Change()), run(p, Change(factor=factor))
    if p.options["reduction"] != "mean":
        one = {name: value * (1 if name == "tokens" else factor) for name, value in one.items()}
    yield from differences(one, other)


def additivity(p: Problem, r: random.Random) -> Iterator[str]:
    """The sums over two parts of a batch add up to that over the batch."""
    if p.loss == "rlcsd_loss" or p.options.get("reduction") == "mean":
        return
    cut = r.randint(0, p.num_tokens)
    every = torch.arange(p.num_tokens)
    one = run(p, Change())
    parts = [run(p, Change(order=part)) for part in (every[:cut], every[cut:])]
    other = {name: parts[0][name] + parts[1][name] for name in one if name != "tokens"}
    other["tokens"] = torch.cat([part["tokens"] for part in parts])
    yield from differences(one, other)


def masked_copies(p: Problem, r: random.Random) -> Iterator[str]:
    """Copies of tokens that do not count change nothing."""
    if not p.num_tokens:
        return
    more = torch.tensor([r.randrange(p.num_tokens) for _ in range(3)])
    order = torch.cat([torch.arange(p.num_tokens), more])
    masked = torch.arange(p.num_tokens, len(order))
    one, other = run(p, Change()), run(p, Change(order=order, masked=masked))
    if other["tokens"][masked].any():
        yield "a token of weight 0 has a loss"
    other["tokens"] = other["tokens"][: p.num_tokens]
    yield from differences(one, other)


def padding(p: Problem, r: random.Random) -> Iterator[str]:
    """Rows of padding behind both heads change nothing."""
    yield from differences(run(p, Change()), run(p, Change(rows=r.randint(1, 9))))


def constants(p: Problem, r: random.Random) -> Iterator[str]:
    """A constant that is added to all logits of the student changes nothing."""
    if "softcap" in p.head or p.values in ("ties", "forbidden"):
        return
    yield from differences(run(p, Change()), run(p, Change(shift=r.choice([1.0, -3.0, 20.0]))))


def unread_metrics(p: Problem, r: random.Random) -> Iterator[str]:
    """Asking for metrics changes neither loss nor gradients."""
    if p.loss in ("token_log_probs", "entry_log_probs"):
        return
    options = {"metrics": ("student_entropy",)}
    yield from differences(run(p, Change(options={"metrics": ()})), run(p, Change(options=options)))


def all_entries(p: Problem, r: random.Random) -> Iterator[str]:
    """A top-k of the whole vocabulary is the full vocabulary."""
    if p.loss != "divergence_loss" or p.settings.get("support", FULL_VOCABULARY) != FULL_VOCABULARY:
        return
    if "entry_clip" in p.settings or p.values == "forbidden":
        return
    kind = r.choice([fused_sd.StudentTopK, fused_sd.TeacherTopK, fused_sd.UnionTopK])
    remainder = r.choice(["tail", "renormalize", "drop"])
    whole = replace(p, teacher_more=0)
    options = {"support": kind(p.valid), "remainder": remainder}
    yield from differences(run(whole, Change()), run(whole, Change(options=options)))


RELATIONS: dict[str, Callable[[Problem, random.Random], Iterator[str]]] = {
    function.__name__: function
    for function in (
        *(permutation, chunks, scaling, additivity, masked_copies, padding, constants),
        *(unread_metrics, all_entries),
    )
}


def differences(one: Outcome, other: Outcome) -> Iterator[str]:
    for name, value in one.items():
        also = other[name]
        if value.shape != also.shape:
            yield f"{name}: shapes {tuple(value.shape)} and {tuple(also.shape)}"
            continue
        known = value.isfinite() & also.isfinite()
        if not torch.equal(value.isfinite(), also.isfinite()):
            yield f"{name}: one is finite where the other is not"
        if not known.any():
            continue
        apart = float((value - also)[known].abs().max())
        largest = float(value[known].abs().max())
        if apart > SLACK * max(largest, 1e-3):
            yield f"{name}: {apart:.2e} apart, the largest is {largest:.2e}"


def problem(seed: int) -> tuple[Problem, str]:
    """A problem in float64 whose numbers a sum's order does not move far, and a relation."""
    r = random.Random(seed)
    p = draw(seed, max_tokens=6, max_vocab=80)
    # of equal logits a product over other tokens may put another one into the top-k
    moved = ("offset", "peaked", "denormal", *(["ties"] if "support" in p.settings else []))
    values = "far" if p.values in moved else p.values
    tokens = p.tokens or (1,)
    p = replace(p, dtype="float64", values=values, tokens=tokens, strides="plain")
    if not p.trained:
        p = replace(p, trained=("hidden", "weight"))
    return p, r.choice(list(RELATIONS))


def check(seed: int) -> list[str]:
    p, name = problem(seed)
    return [f"{name}: {line}" for line in RELATIONS[name](p, random.Random(~seed))]


def code(seed: int) -> str:
    p, name = problem(seed)
    return f"{name} of {p!r}"
