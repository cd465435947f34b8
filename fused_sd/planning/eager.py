"""Losses that hold the logits of all tokens: eager PyTorch, and TRL's SDPO over logits.

Found by counting the allocations of ``fused_sd.bench.providers``' functions (the tests count them
again), in matrices of fp32 logits: every operation between the logits and the loss makes one, and
autograd keeps most of them until its own step.

Dimension key:  A tokens with a weight, D hidden size, V vocabulary
"""

from collections.abc import Sequence
from typing import NamedTuple

from fused_sd.planning.objectives import PlannedObjective
from fused_sd.planning.workload import Moments, Parts, Peer, Workload, exact_gemms

STUDENT, TEACHER = "student logits", "teacher logits"
PROBS, TERMS = "log-probabilities", "terms and their gradients"


class _Held(NamedTuple):
    """What is held at the loss's own peak."""

    matrices: dict[str, int]  # in fp32 matrices of logits
    entry_bytes: int = 0  # of each entry of a truncated support
    backward: bool = False  # in the backward pass, where the teacher's side is gone


_KL = _Held({STUDENT: 1, TEACHER: 1, PROBS: 2, TERMS: 3})
_EAGER: dict[str, _Held] = {
    "forward_kl": _KL,
    "reverse_kl": _KL,
    "mixed_kl": _Held({STUDENT: 1, TEACHER: 1, PROBS: 2, TERMS: 4}),
    "jsd": _Held({STUDENT: 1, TEACHER: 1, PROBS: 2, TERMS: 5}),
    "token": _Held({STUDENT: 1, TERMS: 3}, backward=True),
    "tail": _Held({STUDENT: 1, TERMS: 3}, 12, backward=True),
    "renormalize": _Held({STUDENT: 1, TEACHER: 1}, 36),
}
_TRL_SDPO: dict[str, _Held] = {
    "forward_kl": _KL,
    "reverse_kl": _KL,
    "jsd": _Held({STUDENT: 1, TEACHER: 1, PROBS: 2, TERMS: 9}),  # a logsumexp of a stack
    "tail": _Held({STUDENT: 1, TERMS: 4}, 12, backward=True),
}


def _kind(objective: PlannedObjective) -> str | None:
    """The row of the table; None: nothing is known."""
    if not objective.is_divergence:
        return "token"
    if objective.support == "full":
        return objective.divergence
    return objective.remainder if objective.support in ("student", "teacher") else None


def _moments(table: dict[str, _Held], fp32_gemm: bool = False) -> Moments:
    def moments(work: Workload) -> Sequence[Parts]:
        kind = _kind(work.objective)
        if kind not in table:
            return []
        held, copy = table[kind], _copy_bytes(work) if fp32_gemm else 0
        matrix = 4 * max(work.logits, work.teacher_logits)
        narrow = 0 if fp32_gemm or work.element == 4 else work.element * matrix // 4
        upcast = {
            STUDENT: 4 * work.logits,
            TEACHER: 4 * work.teacher_logits,
            "16-bit logits": narrow,  # of the second side, while they are widened
            "fp32 copies of the head": copy * (1 + work.objective.has_teacher),
        }
        formula = {name: count * matrix for name, count in held.matrices.items()}
        formula["entries"] = held.entry_bytes * work.active * work.objective.k
        formula["fp32 copies of the head"] = copy
        rows = _student_rows(work) if held.backward else work.selected
        return [{**work.selected, **upcast}, {**rows, **formula}, *_head_backward(work, copy)]

    return moments


def _student_rows(work: Workload) -> Parts:
    """Of the selected rows, those that autograd keeps for dW."""
    rows = work.element * work.active * work.hidden_size
    return {"selected rows": rows if work.trained else 0}


def _head_backward(work: Workload, copy: int) -> Sequence[Parts]:
    """The loss's own matrices are gone but the gradient of the logits."""
    if not copy:
        logits = {"gradient of the logits": work.element * work.logits}
        return [{**logits, **_student_rows(work), **work.gradients, **work.gemm}]
    wide = {"dW in fp32": copy if work.trained else 0}
    logits = {"gradient of the logits": 4 * work.logits, "fp32 copies of the head": copy}
    return [{**logits, **_student_rows(work), **wide}, {**wide, **work.gradients}]


def _copy_bytes(work: Workload) -> int:
    """An fp32 copy of a 16-bit head, which autograd keeps for dH."""
    return 4 * work.vocab * work.hidden_size if work.element < 4 else 0


# with a shard's logits they do the same, and beside it tell each other numbers of a token
EAGER = Peer("eager", _moments(_EAGER), exact_gemms, "counted", shards=True)
EAGER_FP32 = Peer(
    "eager, fp32 logits", _moments(_EAGER, fp32_gemm=True), exact_gemms, "counted", shards=True
)
TRL_SDPO = Peer("TRL SDPO", _moments(_TRL_SDPO), exact_gemms, "TRL 1.16.0, counted")
