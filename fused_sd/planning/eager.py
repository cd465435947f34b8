"""Memory of eager PyTorch, the yardstick of a plan: the logits of all tokens, then the formula.

Every operation between the logits and the loss makes another fp32 matrix of their size, and
autograd keeps most of them until backward reaches that operation.  The numbers of matrices were
found by counting the allocations of ``fused_sd.bench``'s eager provider on a CPU, and the tests
count them again.

Dimension key:  A tokens with a weight, D hidden size, V vocabulary
"""

from collections.abc import Sequence
from typing import NamedTuple

from fused_sd.planning.chunked import compared
from fused_sd.planning.objectives import PlannedObjective
from fused_sd.planning.workload import Implementation, Parts, Workload, gemm_flops
from fused_sd.terms.support import GivenEntries, StudentTopK, TeacherTopK

STUDENT, TEACHER = "student logits", "teacher logits"
PROBS, TERMS = "log-probabilities", "terms and their gradients"


class _Held(NamedTuple):
    """Tensors that are alive at the peak of the loss itself."""

    matrices: dict[str, int]  # how many fp32 matrices (A, V) each part has
    entry_bytes: int = 0  # bytes for each entry of a truncated support
    backward: bool = False  # whether the peak is in backward, after the teacher's side was freed


_KL = _Held({STUDENT: 1, TEACHER: 1, PROBS: 2, TERMS: 3})
_HELD: dict[str, _Held] = {
    "forward_kl": _KL,
    "reverse_kl": _KL,
    "mixed_kl": _Held({STUDENT: 1, TEACHER: 1, PROBS: 2, TERMS: 4}),
    "jsd": _Held({STUDENT: 1, TEACHER: 1, PROBS: 2, TERMS: 5}),
    "token": _Held({STUDENT: 1, TERMS: 3}, backward=True),
    "tail": _Held({STUDENT: 1, TERMS: 3}, 12, backward=True),
    "renormalize": _Held({STUDENT: 1, TEACHER: 1}, 36),
}


def _kind(objective: PlannedObjective) -> str | None:
    """The key of ``_HELD``; None if the allocations of such a loss were never counted."""
    comparison, support = objective.comparison, objective.truncated
    if comparison is None:
        return "token"
    if support is None:
        return comparison.term.name
    if isinstance(support, GivenEntries):
        return "tail" if comparison.remainder == "tail" else None
    return comparison.remainder if isinstance(support, StudentTopK | TeacherTopK) else None


def _moments(work: Workload) -> Sequence[Parts]:
    held = _HELD.get(_kind(work.objective) or "")
    if held is None:
        return []
    matrix = 4 * max(work.logits, work.teacher_logits)
    upcast = {
        STUDENT: 4 * work.logits,
        TEACHER: 4 * work.teacher_logits,
        # the second side's logits are still there in 16 bits while they are converted to fp32
        "16-bit logits": 0 if work.element == 4 else work.element * matrix // 4,
    }
    formula = {name: count * matrix for name, count in held.matrices.items()}
    formula["entries"] = held.entry_bytes * work.active * compared(work.objective)
    # of the selected rows, autograd keeps the student's, which dweight needs
    kept = {"selected rows": work.element * work.active * work.hidden_size * work.trained}
    last = {"gradient of the logits": work.element * work.logits, **work.gradients, **work.gemm}
    return [
        {**work.selected, **upcast},
        {**(kept if held.backward else work.selected), **formula},
        {**kept, **last},
    ]


def _gemms(work: Workload) -> float:
    """FLOPs of both sides' logits, dhidden, and dweight if the head is trained."""
    return gemm_flops(work, 2 + work.trained, 1)


EAGER = Implementation("eager", _moments, _gemms, "counted")
