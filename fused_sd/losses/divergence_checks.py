"""What a divergence is refused for before anything is computed, and what its settings mean.

Dimension key:  (...) tokens
"""

from typing import Any

import torch

from fused_sd import checks
from fused_sd.checks import tensors as tensor_checks
from fused_sd.head.projection import LMHead
from fused_sd.terms.support import (
    FullVocabulary,
    StudentTopK,
    Support,
    TeacherTopK,
    TokenIds,
    UnionTopK,
)

_KINDS = {
    FullVocabulary: "full",
    StudentTopK: "student",
    TeacherTopK: "teacher",
    UnionTopK: "union",
    TokenIds: "ids",
}
TokenClip = float | tuple[float | None, float | None] | None


def check_sides(
    student_hidden: Any, student: LMHead, teacher_hidden: Any, teacher: LMHead
) -> torch.Size:
    """Both sides fit their heads and each other; returns the tokens' shape."""
    tensor_checks.check_hidden(student_hidden, "student_hidden", student.weight, "student_head")
    tensor_checks.check_hidden(teacher_hidden, "teacher_hidden", teacher.weight, "teacher_head")
    if teacher_hidden.shape[:-1] != student_hidden.shape[:-1]:
        checks.fail(
            "teacher_hidden",
            f"have the tokens {tuple(student_hidden.shape[:-1])} of student_hidden",
            tuple(teacher_hidden.shape[:-1]),
            "select the response positions on both sides",
        )
    if teacher_hidden.device != student_hidden.device:
        checks.fail(
            "teacher_hidden",
            f"be on {student_hidden.device} as student_hidden",
            teacher_hidden.device,
            "move it there",
        )
    tensor_checks.check_teacher("teacher_hidden", teacher_hidden, student_hidden)
    tensor_checks.check_teacher("teacher_head", teacher.weight, student.weight)
    tensor_checks.check_teacher("teacher_head.bias", teacher.bias, student.bias)
    return student_hidden.shape[:-1]


def support_kind(support: Support) -> str:
    kind = _KINDS.get(type(support))
    if kind is None:
        checks.fail(
            "support",
            "be FULL_VOCABULARY, StudentTopK(k), TeacherTopK(k), UnionTopK(k) or TokenIds(ids)",
            repr(support),
            "pass one of them",
        )
    assert kind is not None
    return kind


def check_reach(student_vocab: int, teacher_vocab: int, name: str, kind: str) -> None:
    """A KL over the whole vocabulary is infinite where only its first argument has mass."""
    if kind == "full":
        checks.check_vocabularies(
            student_vocab,
            teacher_vocab,
            infinite_if_student_smaller=name in ("forward_kl", "mixed_kl"),
            infinite_if_teacher_smaller=name in ("reverse_kl", "mixed_kl"),
        )


def token_bounds(token_clip: TokenClip) -> tuple[float | None, float | None] | None:
    if token_clip is None:
        return None
    bounds = token_clip if isinstance(token_clip, tuple) else (None, token_clip)
    for bound in bounds:
        if bound is not None:
            checks.check_finite("token_clip", bound, "pass a bound or (lower, upper)")
    low, high = bounds
    if (low is None and high is None) or (low is not None and high is not None and low >= high):
        checks.fail("token_clip", "be (lower, upper) with lower < upper", token_clip, "order them")
    return low, high
