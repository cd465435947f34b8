"""Losses on heads that 1, 2 and 4 processes share, beside the same loss on the whole head.

All processes draw the same problems, cut both heads at the same drawn borders, and compare loss,
token losses, metrics and their rows of the gradients with what one process makes of them.
"""

import random
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from fuzz_losses import arguments, upstream
from fuzz_problem import Problem, Tensors, draw
from ranks import run as run_on_ranks
from torch import Tensor

import fused_sd
from fused_sd import LMHead

NUM_RANKS = 4
GROUPS = (1, 2, 4)
SLACK = {"float64": 1e-9, "float32": 2e-4}  # of the largest number
Outcome = dict[str, Tensor]


def problem(seed: int) -> Problem:
    """A problem whose head has a row for each rank, in a dtype of 32 or 64 bits."""
    p = draw(seed, max_tokens=5, max_vocab=60)
    dtype = "float32" if p.dtype == "float32" else "float64"
    # sums in another order choose other entries among ties, and move large logits far
    values = "far" if p.values in ("ties", "offset", "peaked", "zero", "equal") else p.values
    return replace(p, dtype=dtype, values=values, strides="plain", teacher_more=0)


def outcome(p: Problem, sizes: Sequence[int] | None, group: Any) -> Outcome:
    """What one rank makes of a problem, or what one process makes of the whole head."""
    t = Tensors(p, getattr(torch, p.dtype))
    given, named = arguments(p, t)
    if sizes is None:
        leaves, mine = t.leaves, list(given)
    else:
        at = slice(sum(sizes[: group.rank()]), sum(sizes[: group.rank() + 1]))
        leaves = dict(t.leaves)
        for name in ("weight", "bias"):
            if name in leaves:
                leaf = leaves[name].detach()[at].clone()
                leaves[name] = leaf.requires_grad_(t.leaves[name].requires_grad)
        student, teacher = t.heads()
        own = leaves["weight"], leaves.get("bias")
        student = replace(student, weight=own[0], bias=own[1], shard_sizes=tuple(sizes))
        its = teacher.weight[at].clone(), teacher.bias
        its = its[0], None if its[1] is None else its[1].detach()[at].clone()
        teacher = replace(teacher, weight=its[0], bias=its[1], shard_sizes=tuple(sizes))
        mine = [given[0], student, *given[2:]]
        if len(mine) == 4 and isinstance(mine[3], LMHead):
            mine[3] = teacher
        if "teacher_head" in named:
            named["teacher_head"] = teacher
        named["process_group"] = group
    output = getattr(fused_sd, p.loss)(*mine, **named)
    if p.loss == "token_log_probs":
        found, loss = {"tokens": output.log_probs.detach()}, output.log_probs
    elif p.loss == "entry_log_probs":
        found, loss = {"tokens": output.log_probs.detach()}, output.log_probs.sum(-1)
    else:
        loss, found = output.loss, {"loss": output.loss.detach(), "tokens": output.token_loss}
        found |= output.metrics
    wanted = {name: leaf for name, leaf in leaves.items() if leaf.requires_grad}
    if wanted:
        scaled = (loss * upstream(p, loss)).sum()
        made = torch.autograd.grad(scaled, list(wanted.values()), materialize_grads=True)
        found |= {f"d{name}": value for name, value in zip(wanted, made)}
    return found


def failures_of(p: Problem, sizes: Sequence[int], group: Any) -> list[str]:
    at = slice(sum(sizes[: group.rank()]), sum(sizes[: group.rank() + 1]))
    whole, shared = outcome(p, None, None), outcome(p, sizes, group)
    failures = []
    for name, value in shared.items():
        want = whole[name][at] if name in ("dweight", "dbias") else whole[name]
        if value.shape != want.shape:
            failures.append(f"{name} has the shape {tuple(value.shape)}")
            continue
        finite = want.isfinite()
        if not torch.equal(finite, value.isfinite()):
            failures.append(f"{name}: one is finite where the other is not")
        known = whole[name][whole[name].isfinite()]
        bound = SLACK[p.dtype] * max(float(known.abs().max()) if known.numel() else 0.0, 1e-2)
        apart = (value - want)[finite & value.isfinite()].abs()
        if apart.numel() and float(apart.max()) > bound:
            failures.append(f"{name}: {float(apart.max()):.2e} apart, {bound:.1e} allowed")
    return failures


def work(rank: int, cases: Sequence[int]) -> list[tuple[int, list[str]]]:
    """All cases on the groups that this rank is in, and what is wrong there."""
    groups = {}
    for size in GROUPS:
        for first in range(0, NUM_RANKS, size):
            members = list(range(first, first + size))
            made = dist.new_group(members)
            if rank in members:
                groups[size] = made
    failures = []
    for case in cases:
        p = problem(case)
        r = random.Random(case)
        for size, group in groups.items():
            borders = sorted(r.randint(0, p.vocab) for _ in range(size - 1))
            ends = [*borders, p.vocab]
            sizes = [end - start for start, end in zip([0, *borders], ends)]
            if 0 in sizes:  # a head has a row at least
                continue
            try:
                found = failures_of(p, sizes, group)
            except ValueError as error:
                found = [f"ValueError: {error}"]
            if found:
                lines = [f"{size} ranks with {sizes}, rank {group.rank()}: {x}" for x in found]
                failures.append((case, lines))
    return failures


def check_all(cases: Sequence[int]) -> tuple[list[tuple[int, list[str]]], Counter[str]]:
    """Check all cases in one group of processes."""
    with tempfile.TemporaryDirectory() as folder:
        every = run_on_ranks(work, NUM_RANKS, Path(folder), list(cases))
    merged: dict[int, list[str]] = {}
    for failures in every:
        for case, lines in failures:
            merged.setdefault(case, []).extend(lines)
    return sorted(merged.items()), Counter()


def check(seed: int) -> list[str]:
    failures, _ = check_all([seed])
    return failures[0][1] if failures else []


def code(seed: int) -> str:
    return repr(problem(seed))
