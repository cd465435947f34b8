"""A cell: one problem that every provider is checked and timed on, in a random order."""

import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch

from fused_sd.bench.accuracy import Errors, Truth, errors, find_truth
from fused_sd.bench.floor import Floor, measure_floor
from fused_sd.bench.limits import DeviceLost, TimeLimit, TimeUp, time_limit
from fused_sd.bench.measure import (
    Effort,
    Times,
    forget,
    is_out_of_memory,
    peak_bytes,
    synchronize,
    time_runs,
    tiny_is_zero,
)
from fused_sd.bench.problem import Problem, refill_
from fused_sd.bench.providers import Provider
from fused_sd.measuring.environment import installed
from fused_sd.verify.promises import Sparsity

# "checked": the errors are within the bound, and no time was asked for
Status = Literal["ok", "checked", "wrong", "unavailable", "out of memory", "too slow", "failed"]

REASON = 200  # characters that are kept of a provider's error message


@dataclass
class Row:
    """The result of one provider."""

    provider: str
    version: str | None  # of its package; None: PyTorch alone
    note: str
    status: Status = "failed"
    reason: str = ""  # why the provider is wrong or did not run
    errors: Errors | None = None
    times: Times | None = None
    peak_bytes: int | None = None  # beyond the operands, gradients included
    kept: Sparsity | None = None  # None: the gradient is dense


@dataclass(frozen=True)
class Cell:
    """Sizes of a problem, its floor, and the results of the providers."""

    objective: str
    hidden_size: int
    vocab: int
    tokens: int
    counted: int  # tokens that the mask keeps
    dtype: str
    trainable: bool
    shared_head: bool
    entropy: float  # nat, the student's mean over the tokens that count
    floor: Floor | None  # None: not timed, or out of memory
    bound: float  # largest error of a provider that is right
    rows: list[Row]

    def ratio(self, row: Row) -> float | None:
        """Return a provider's time divided by the floor's."""
        if self.floor is None or row.times is None:
            return None
        return row.times.p50 / self.floor.milliseconds

    def tflops(self, row: Row) -> float | None:
        """Return the floor's TFLOP divided by a provider's time; recomputation does not count."""
        if self.floor is None or row.times is None:
            return None
        return self.floor.flop / row.times.p50 / 1e9

    def row_gigabytes(self, row: Row) -> float | None:
        """Return the GB/s of the passes over the logits if they take all time above the floor."""
        if self.floor is None or row.times is None:
            return None
        above = row.times.p50 - self.floor.milliseconds
        return self.floor.row_bytes / above / 1e6 if above > 0 else None

    def as_json(self) -> dict[str, Any]:
        """Return all results, and the ratios computed from them, as plain values."""
        facts = {name: value for name, value in vars(self).items() if name not in ("floor", "rows")}
        floor = None
        if self.floor is not None:
            floor = self.floor._asdict() | {"milliseconds": self.floor.milliseconds}
        rows = []
        for row in self.rows:
            plain = asdict(row)
            for name in ("errors", "times", "kept"):
                part = getattr(row, name)
                plain[name] = None if part is None else part._asdict()
            plain["ratio_to_floor"] = self.ratio(row)
            plain["tflops"] = self.tflops(row)
            plain["row_gigabytes"] = self.row_gigabytes(row)
            rows.append(plain)
        return {**facts, "floor": floor, "rows": rows}


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
) -> Cell:
    """Check and time every provider that has the problem's objective.

    Args:
        problem: a ``variant`` of ``source``; its tokens are overwritten.
        source: the tokens to time.
        providers: all providers; those without the objective are left out of the cell.
        effort: how long each provider is timed; None: errors only.
        floor_warm_seconds: seconds of bare GEMMs before anything is timed, for clocks to settle.
        provider_seconds: time limit of each provider, who is "too slow" beyond it; None: no limit.
        seed: of the providers' random order.

    Raises:
        DeviceLost: the GPU fails everything since a provider ran, so that no row can be believed.
    """
    device = problem.hidden.device
    asked = [p for p in providers if problem.objective in p.objectives]
    rows = [Row(p.name, installed(p.package) if p.package else None, p.note) for p in asked]
    found, counted = find_truth(problem), int(problem.mask.sum())
    entropy = float(problem.entropies[problem.mask].mean())
    forget(device)
    floor = None
    if effort is not None:
        try:
            floor = measure_floor(problem, effort._replace(warm_seconds=floor_warm_seconds))
        except Exception as error:
            if not is_out_of_memory(error):
                raise
    order = list(range(len(asked)))
    random.Random(seed).shuffle(order)
    for place in order:
        _measure(rows[place], asked[place], problem, source, found, effort, provider_seconds)
        try:
            synchronize(device)
        except RuntimeError as error:
            raise DeviceLost(asked[place].name, error) from error
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
        rows,
    )


def _measure(
    row: Row,
    provider: Provider,
    problem: Problem,
    source: Problem,
    found: Truth,
    effort: Effort | None,
    seconds: float | None,
) -> None:
    """Fill a provider's row; an exception of the provider is a result, not an error of ours."""
    try:
        with time_limit(seconds) as limit:
            _check_and_time(row, provider, problem, source, found, effort, limit)
    except (Exception, TimeUp) as error:
        said = str(error).strip() or "no message"
        row.status = "out of memory" if is_out_of_memory(error) else "failed"
        row.reason = f"{type(error).__name__}: {said.splitlines()[0][:REASON]}"
        if isinstance(error, TimeUp):
            row.status, row.reason = "too slow", said
        row.times = row.peak_bytes = row.kept = None
    finally:
        _drop_gradients(problem)


def _check_and_time(
    row: Row,
    provider: Provider,
    problem: Problem,
    source: Problem,
    found: Truth,
    effort: Effort | None,
    limit: TimeLimit,
) -> None:
    device = problem.hidden.device
    forget(device)
    reason = provider.why_not(problem)
    if reason is not None:
        row.status, row.reason = "unavailable", reason
        return
    refill_(problem, source, found.tokens)
    build = provider.build(problem)
    loss = build()
    loss.backward()
    row.errors = errors(found, problem, loss.detach())
    del loss
    _drop_gradients(problem)
    beyond = row.errors.beyond(found.bound)
    if beyond:
        row.status = "wrong"
        row.reason = f"{', '.join(beyond)}; rounding explains at most {found.bound:.1%}"
        return
    row.status = "checked"
    if effort is None:
        return
    refill_(problem, source, torch.arange(len(problem.mask), device=device))

    def run() -> None:
        limit.check()
        build().backward()
        _drop_gradients(problem)

    row.times = time_runs(run, device, effort, limit.check)
    row.peak_bytes = peak_bytes(run, device)
    if provider.certify is not None:
        row.kept = Sparsity.of(provider.certify(problem), problem.mask)
    row.status = "ok"


def _drop_gradients(problem: Problem) -> None:
    problem.hidden.grad = problem.weight.grad = None
