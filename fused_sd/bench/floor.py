"""The floor: the bare GEMMs that an objective cannot do without, in the same run.

``u`` is one product with the head, 2 M V D floating-point operations.  A loss of the student alone
needs its logits and the gradient by the states, and by a trainable head; one that compares
distributions needs the teacher's logits too.  Over a top-k of the teacher, renormalised, the
student's logits matter at K entries only: one product in all.

Two kinds are timed, and the faster is the floor: logits and the head's gradient in fp32, as this
library has them, and everything in the operands' dtype.

Dimension key:  M tokens that count, C tokens in a chunk, D hidden size, V vocabulary
"""

from typing import NamedTuple

import torch
from torch import Tensor

from fused_sd.bench.measure import Effort, time_runs
from fused_sd.bench.problem import Problem
from fused_sd.head.projection import accumulation_dtype, matmul, matmul_add_
from fused_sd.measuring.realistic import slabs

FLOOR_RUNS = 10  # at most
CHUNK = 4096  # tokens: more would not make a GEMM faster
TEACHER_COMPARED = ("forward_kl", "reverse_kl", "jsd", "topk_tail", "rlsd")
# times that a pass over the rows must read fp32 logits: for the statistics and for the gradient;
# the JSD's gradient needs its own sum first; RLSD's teacher is read for the statistics only
ROW_READS = {
    "forward_kl": 4,
    "reverse_kl": 4,
    "jsd": 6,
    "topk_tail": 4,
    "topk_renormalized": 1,
    "cross_entropy": 2,
    "token_log_probs": 2,
    "grpo": 2,
    "rlsd": 3,
}


class Products(NamedTuple):
    """How many products with the head an objective needs."""

    logits: int
    dhidden: int
    dweight: int

    @property
    def u(self) -> int:
        return sum(self)


def products(objective: str, trainable: bool) -> Products:
    """Of an objective's forward and backward."""
    if objective == "topk_renormalized":
        return Products(1, 0, 0)
    return Products(2 if objective in TEACHER_COMPARED else 1, 1, int(trainable))


class Floor(NamedTuple):
    """Median milliseconds of the products, with fp32 results and with the operands' dtype's."""

    u: int
    wide_ms: float
    narrow_ms: float
    flop: int
    row_bytes: int  # that passes over the logits must move besides

    @property
    def milliseconds(self) -> float:
        return min(self.wide_ms, self.narrow_ms)


def measure_floor(problem: Problem, effort: Effort) -> Floor:
    """Time the products that a problem needs, on the tokens that count."""
    hidden, weight = problem.hidden.detach()[problem.mask], problem.weight.detach()
    needed = products(problem.objective, problem.trainable)
    wide = accumulation_dtype(hidden.dtype)
    effort = effort._replace(runs=min(effort.runs, FLOOR_RUNS))
    narrow_ms = _median(hidden, weight, hidden.dtype, needed, effort)
    wide_ms = narrow_ms
    if hidden.dtype != wide:
        if not hidden.is_cuda:  # a CPU has no product of 16-bit operands with an fp32 result
            hidden, weight = hidden.to(wide), weight.to(wide)
        wide_ms = _median(hidden, weight, wide, needed, effort._replace(warm_seconds=0.0))
    num_logits = len(hidden) * len(weight)
    written = problem.hidden.element_size() if needed.dhidden else 0
    return Floor(
        needed.u,
        wide_ms,
        narrow_ms,
        2 * needed.u * num_logits * hidden.shape[1],
        (4 * ROW_READS[problem.objective] + written) * num_logits,
    )


def _median(
    hidden: Tensor, weight: Tensor, dtype: torch.dtype, needed: Products, effort: Effort
) -> float:
    """Of the products over all chunks, logits and the head's gradient in ``dtype``."""
    size = min(CHUNK, len(hidden))
    logits = hidden.new_empty((size, len(weight)), dtype=dtype)
    # noise and not zeros, which cost a GPU less power and let its clock rise
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

    return time_runs(run, hidden.device, effort).p50
