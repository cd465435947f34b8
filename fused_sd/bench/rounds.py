"""Measuring a cell: every provider is checked, and then all of them are timed in turns.

Every round times each provider and the floor, in a random order, so that what else the machine
does meets all of them alike.
"""

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from fused_sd.bench.accuracy import Truth, errors, find_truth
from fused_sd.bench.cell import Cell, Row
from fused_sd.bench.floor import BareGemms
from fused_sd.bench.limits import DeviceLost, TimeLimit, TimeUp
from fused_sd.bench.measure import (
    Effort,
    Run,
    affordable,
    forget,
    peak_bytes,
    synchronize,
    timed,
    times_of,
    tiny_is_zero,
    warm_up,
)
from fused_sd.bench.problem import Loss, Problem, refill_
from fused_sd.bench.providers import Provider
from fused_sd.engine.out_of_memory import is_out_of_memory
from fused_sd.measuring.environment import installed
from fused_sd.verify.promises import Sparsity

REASON = 200  # characters that are kept of a provider's error message
# Runs that a provider makes in one turn, at most.  Several, one after another, hide the launches
# of a GPU.
TURN = {"cuda": 5, "cpu": 1}
# takes what is done now, and the seconds until the cell is done, None: unknown
Say = Callable[[str, float | None], None]


@dataclass
class _Entrant:
    """A provider on its way through a cell."""

    row: Row
    provider: Provider
    limit: TimeLimit
    loss: Loss | None = None  # None: it is not right, or was not checked
    once: float = 0.0  # seconds of a run
    left: int = 0  # runs that it is still to be timed
    milliseconds: list[float] = field(default_factory=list)


@tiny_is_zero()
def measure_cell(
    problem: Problem,
    source: Problem,
    providers: Sequence[Provider],
    effort: Effort | None,
    *,
    floor_warm_seconds: float = 0.0,
    provider_seconds: float | None = None,
    seed: int = 0,
    say: Say = lambda what, left: None,
) -> Cell:
    """Check and time every provider that has the problem's objective.

    Args:
        problem: a ``variant`` of ``source``; its tokens are overwritten.
        source: the tokens to time.
        providers: all providers; those without the objective are left out of the cell.
        effort: how long each provider is timed; None: errors only.
        floor_warm_seconds: seconds of bare GEMMs before anything is timed, for clocks to settle.
        provider_seconds: time limit of each provider, who is "too slow" beyond it; None: no limit.
        seed: of the providers' random order, another one in each round.
        say: called before each step.

    Raises:
        DeviceLost: the GPU fails everything since a provider ran, so that no row can be believed.
    """
    device, draw = problem.hidden.device, random.Random(seed)
    asked = [p for p in providers if problem.objective in p.objectives]
    entrants = [
        _Entrant(
            Row(p.name, installed(p.package) if p.package else None, p.note),
            p,
            TimeLimit(provider_seconds),
        )
        for p in asked
    ]
    torch.compiler.reset()  # it keeps a few variants of a function, and then stops compiling it
    say("computing the truth in float64", None)
    found, counted = find_truth(problem), int(problem.mask.sum())
    entropy = float(problem.entropies[problem.mask].mean())
    forget(device)
    for entrant in draw.sample(entrants, len(entrants)):
        say(f"checking {entrant.provider.name}", None)
        with _turn(entrant, problem):
            _check(entrant, problem, source, found)
    floor = None
    if effort is not None:
        refill_(problem, source, torch.arange(len(problem.mask), device=device))
        bare = BareGemms(problem, effort, floor_warm_seconds)
        _time(entrants, bare, problem, effort, draw, say)
        floor = bare.floor()
    return Cell(
        problem.objective,
        problem.hidden.shape[1],
        problem.vocab,
        len(problem.mask),
        counted,
        str(problem.hidden.dtype).removeprefix("torch."),
        problem.trainable,
        problem.teacher_weight is problem.weight,
        entropy,
        floor,
        found.bound,
        [entrant.row for entrant in entrants],
    )


@contextmanager
def _turn(entrant: _Entrant, problem: Problem) -> Iterator[None]:
    """Let a provider work; an exception of its own is its result, not an error of ours."""
    row = entrant.row
    try:
        with entrant.limit.turn():
            yield
    except (Exception, TimeUp) as error:
        said = str(error).strip() or "no message"
        row.status = "out of memory" if is_out_of_memory(error) else "failed"
        row.reason = f"{type(error).__name__}: {said.splitlines()[0][:REASON]}"
        if isinstance(error, TimeUp):
            row.status, row.reason = "too slow", said
        row.times = row.peak_bytes = row.kept = entrant.loss = None
        entrant.left = 0
    finally:
        _drop_gradients(problem)
    try:
        synchronize(problem.hidden.device)
    except RuntimeError as error:
        raise DeviceLost(row.provider, error) from error


def _check(entrant: _Entrant, problem: Problem, source: Problem, found: Truth) -> None:
    """Compare a provider with the truth, on the copied tokens."""
    row, provider = entrant.row, entrant.provider
    forget(problem.hidden.device)
    reason = provider.why_not(problem)
    if reason is not None:
        row.status, row.reason = "unavailable", reason
        return
    refill_(problem, source, found.tokens)
    build = provider.build(problem)
    loss = build()
    loss.backward()
    row.errors = errors(found, problem, loss.detach())
    beyond = row.errors.beyond(found.bound)
    if beyond:
        row.status = "wrong"
        row.reason = f"{', '.join(beyond)}; rounding explains at most {found.bound:.1%}"
        return
    row.status, entrant.loss = "checked", build


def _time(
    entrants: Sequence[_Entrant],
    bare: BareGemms,
    problem: Problem,
    effort: Effort,
    draw: random.Random,
    say: Say,
) -> None:
    """Weigh every provider that is right, then time all of them and the bare GEMMs in turns."""
    device = problem.hidden.device
    right = [entrant for entrant in entrants if entrant.loss is not None]
    for entrant in draw.sample(right, len(right)):
        say(f"warming up {entrant.provider.name}", None)
        with _turn(entrant, problem):
            _weigh(entrant, problem, effort)
    bare.warm_up()
    turns: list[tuple[_Entrant | BareGemms, Callable[[int], None]]] = [(bare, bare.take_turn)]
    turns += [(entrant, _turns(entrant, problem)) for entrant in right]
    count = -(-max(each.left for each, _ in turns) // TURN[device.type])
    for number in range(count):
        left = sum(each.left * each.once for each, _ in turns)
        say(f"round {number + 1} of {count}", left)
        for each, take_turn in draw.sample(turns, len(turns)):
            take_turn(-(-each.left // (count - number)))  # all have turns until the last round
    for entrant in right:
        if entrant.loss is not None:
            entrant.row.times, entrant.row.status = times_of(entrant.milliseconds), "ok"


def _run(entrant: _Entrant, problem: Problem) -> Run:
    """Return one forward and backward of a provider."""
    loss = entrant.loss
    assert loss is not None

    def run() -> None:
        entrant.limit.check()
        loss().backward()
        _drop_gradients(problem)

    return run


def _weigh(entrant: _Entrant, problem: Problem, effort: Effort) -> None:
    """Warm a provider up, take its memory, and decide how often it is timed."""
    row, device, run = entrant.row, problem.hidden.device, _run(entrant, problem)
    forget(device)
    entrant.once = warm_up(run, device, effort.warm_seconds)
    entrant.left = affordable(effort, entrant.once)
    entrant.limit.check(entrant.left * entrant.once)
    row.peak_bytes = peak_bytes(run, device)
    if entrant.provider.certify is not None:
        row.kept = Sparsity.of(entrant.provider.certify(problem), problem.mask)


def _turns(entrant: _Entrant, problem: Problem) -> Callable[[int], None]:
    """Return a function that times some of the provider's runs that are left."""

    def take_turn(count: int) -> None:
        if not count:
            return
        entrant.left -= count
        with _turn(entrant, problem):
            if problem.hidden.is_cuda:  # what others left is not to be freed while this is timed
                torch.cuda.empty_cache()
            run = _run(entrant, problem)
            entrant.milliseconds += timed(run, problem.hidden.device, count)

    return take_turn


def _drop_gradients(problem: Problem) -> None:
    problem.hidden.grad = problem.weight.grad = None
