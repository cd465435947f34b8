"""Checks of the two sides of a loss: states that fit their head, a teacher that is a constant."""

from typing import Any

from fused_sd import checks
from fused_sd.checks import tensors as tensor_checks
from fused_sd.head.lm_head import LMHead


def check_teacher_states(
    teacher_hidden: Any, teacher: LMHead, hidden: Any, student: LMHead, owner: str
) -> None:
    """Check that a teacher's states fit its head and the student's tokens, and need no gradient.

    Args:
        teacher_hidden: (..., D') states.
        teacher: their head.
        hidden: (..., D) the student's states, already checked.
        student: the student's head.
        owner: what the loss calls the student's states.
    """
    tensor_checks.check_hidden(teacher_hidden, "teacher_hidden", teacher.weight, "teacher_head")
    if teacher_hidden.shape[:-1] != hidden.shape[:-1]:
        checks.fail(
            "teacher_hidden",
            f"have the tokens {tuple(hidden.shape[:-1])} of {owner}",
            tuple(teacher_hidden.shape[:-1]),
            "select the response positions on both sides",
        )
    tensor_checks.check_device("teacher_hidden", teacher_hidden, hidden.device, owner)
    tensor_checks.check_teacher("teacher_hidden", teacher_hidden, hidden)
    tensor_checks.check_teacher("teacher_head", teacher.weight, student.weight)
    tensor_checks.check_teacher("teacher_head.bias", teacher.bias, student.bias)
