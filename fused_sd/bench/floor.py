"""The floor of an objective: the time of its bare GEMMs, measured in the same run.

``u`` is one GEMM with the head: 2 M V D floating-point operations.  A loss of the student alone
needs the student's logits, dhidden, and dweight if the head is trained.  A loss that compares two
distributions also needs the teacher's logits.  A renormalised top-k of the teacher needs the
teacher's logits only: the student's are computed at K entries a token.

Two variants are timed, and the faster is the floor: logits and dweight in fp32, as this library
has them, and everything in the operands' dtype.

Dimension key:  M tokens that count, C tokens in a chunk, D hidden size, V vocabulary
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch

from fused_sd.bench.measure import (
    Effort,
    Run,
    affordable,
    quantile,
    timed,
    warm_up,
)
from fused_sd.bench.problem import Problem
from fused_sd.engine.out_of_memory import is_out_of_memory
from fused_sd.head.projection import accumulation_dtype, matmul, matmul_add_
from fused_sd.measuring.realistic import slabs

FLOOR_RUNS = 10  # at most
CHUNK = 4096  # tokens: a longer chunk would not make a GEMM faster


class Needs(NamedTuple):
    """What an objective cannot be computed without."""

    logits: int  # GEMMs: one for each side whose logits are needed at the whole vocabulary
    is_dense: bool  # whether its gradient reaches the whole vocabulary, so that it needs GEMMs too
    row_reads: int  # how often fp32 logits of one side are read


# Row reads: each side's logits once for its normaliser and once for the gradient, the JSD's and
# OPSD's once more for a sum that their gradients need, RLSD's teacher's for the normaliser only,
# and a renormalised top-k's teacher's for choosing the entries.
NEEDS = {
    "forward_kl": Needs(2, True, 4),
    "reverse_kl": Needs(2, True, 4),
    "jsd": Needs(2, True, 6),
    "opsd": Needs(2, True, 6),
    "topk_tail": Needs(2, True, 4),
    "topk_renormalized": Needs(1, False, 1),
    "cross_entropy": Needs(1, True, 2),
    "token_log_probs": Needs(1, True, 2),
    "grpo": Needs(1, True, 2),
    "rlsd": Needs(2, True, 3),
}


class Products(NamedTuple):
    """Numbers of GEMMs with the head that an objective needs."""

    logits: int
    dhidden: int
    dweight: int

    @property
    def u(self) -> int:
        """Number of all GEMMs."""
        return sum(self)


def products(objective: str, trainable: bool) -> Products:
    """Return the GEMMs of an objective's forward and backward."""
    needs = NEEDS[objective]
    return Products(needs.logits, int(needs.is_dense), int(needs.is_dense and trainable))


class Floor(NamedTuple):
    """Time of an objective's bare GEMMs."""

    u: int  # number of GEMMs
    wide_ms: float  # median milliseconds with fp32 logits and dweight
    narrow_ms: float  # median milliseconds with everything in the operands' dtype
    flop: int
    row_bytes: int  # bytes that passes over the logits must move besides

    @property
    def milliseconds(self) -> float:
        """The faster variant's time."""
        return min(self.wide_ms, self.narrow_ms)


def gemms(problem: Problem, *, wide: bool) -> Run:
    """Return a function that runs the GEMMs that a problem needs, on the tokens that count.

    It holds their results, so that it should not live longer than it is timed.

    Args:
        problem: its objective, head and tokens.
        wide: whether logits and dweight are fp32 where the operands have 16 bits.
    """
    hidden, weight = problem.hidden.detach()[problem.mask], problem.weight.detach()
    needed = products(problem.objective, problem.trainable)
    dtype = accumulation_dtype(hidden.dtype) if wide else hidden.dtype
    if not hidden.is_cuda:  # a CPU has no GEMM of 16-bit operands with an fp32 result
        hidden, weight = hidden.to(dtype), weight.to(dtype)
    size = min(CHUNK, len(hidden))
    logits = hidden.new_empty((size, len(weight)), dtype=dtype)
    # noise instead of zeros: zeros cost a GPU less power, so that its clock rises
    dlogits = hidden.new_empty(logits.shape).normal_() if needed.dhidden else logits
    dhidden = torch.empty_like(hidden) if needed.dhidden else hidden
    dweight = weight.new_zeros(weight.shape, dtype=dtype) if needed.dweight else weight

    def run() -> None:
        for rows in slabs(len(hidden), size):
            count = rows.stop - rows.start
            for _ in range(needed.logits):
                matmul(hidden[rows], weight.t(), logits[:count])
            for _ in range(needed.dhidden):
                matmul(dlogits[:count], weight, dhidden[rows])
            for _ in range(needed.dweight):
                matmul_add_(dlogits[:count].t(), hidden[rows], dweight)

    return run


def floor_of(problem: Problem, narrow_ms: float, wide_ms: float) -> Floor:
    """Return a problem's floor, given the median milliseconds of both variants."""
    needed = products(problem.objective, problem.trainable)
    num_logits = int(problem.mask.sum()) * problem.vocab
    written = problem.hidden.element_size() if needed.dhidden else 0
    return Floor(
        needed.u,
        wide_ms,
        narrow_ms,
        2 * needed.u * num_logits * problem.hidden.shape[1],
        (4 * NEEDS[problem.objective].row_reads + written) * num_logits,
    )


class BareGemms:
    """The GEMMs of the floor, which take turns as a provider does.

    Their results are allocated in each turn, not to take memory from the providers.
    """

    def __init__(self, problem: Problem, effort: Effort, warm_seconds: float) -> None:
        self.problem, self.warm_seconds = problem, warm_seconds
        self.effort = effort._replace(runs=min(effort.runs, FLOOR_RUNS))
        is_wide = accumulation_dtype(problem.hidden.dtype) == problem.hidden.dtype
        self.milliseconds: dict[bool, list[float]] = {wide: [] for wide in {False, not is_wide}}
        self.once, self.left = 0.0, 0

    def warm_up(self) -> None:
        """Run until the clocks have settled, and decide how often the GEMMs are timed."""
        device, seconds = self.problem.hidden.device, self.warm_seconds
        for wide in self.milliseconds:
            with self._memory():
                run = gemms(self.problem, wide=wide)
                self.once += warm_up(run, device, seconds)
                self.left = affordable(self.effort, self.once)
            seconds = 0.0

    def take_turn(self, count: int) -> None:
        """Time some of either variant's runs that are left."""
        self.left -= count
        for wide in self.milliseconds if count else ():
            with self._memory():
                run = gemms(self.problem, wide=wide)
                run()  # touches what was allocated
                self.milliseconds[wide] += timed(run, self.problem.hidden.device, count)

    def floor(self) -> Floor | None:
        """Return the floor; None: out of memory."""
        medians = {wide: quantile(ms, 0.5) for wide, ms in self.milliseconds.items() if ms}
        if len(medians) < len(self.milliseconds):
            return None
        return floor_of(self.problem, medians[False], medians.get(True, medians[False]))

    @contextmanager
    def _memory(self) -> Iterator[None]:
        """Give up where there is no memory for the GEMMs' results."""
        try:
            yield
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            self.left = 0
