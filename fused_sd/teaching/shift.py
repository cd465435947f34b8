"""Detect teacher states that were taken one position too early or too late.

Dimension key:  N response tokens, D hidden size, V vocabulary
"""

from typing import NamedTuple

import torch
from torch import Tensor

from fused_sd.checks import check_instance, check_positive, fail
from fused_sd.checks.tensors import check_hidden
from fused_sd.head.lm_head import LMHead, as_head
from fused_sd.losses.log_probs import token_log_probs
from fused_sd.teaching.align import Alignment


class ShiftEvidence(NamedTuple):
    """How close the teacher is to the student under three assumptions about its positions.

    Attributes:
        shift: the assumption that fits best: -1 one position early, 0 right, +1 one position late.
        gaps: mean ``|log t - log s|`` in nats of the response tokens if the states are early,
            right or late, in this order.  NaN if no response has three tokens; ``shift`` is 0 then.

    Examples:
        >>> import fused_sd
        >>> fused_sd.ShiftEvidence(0, (3.1, 0.2, 2.9)).require()  # right: nothing happens
        >>> fused_sd.ShiftEvidence(1, (3.1, 2.9, 0.2)).require()
        Traceback (most recent call last):
        ValueError: teacher_hidden must be the states that predict the response's tokens, ...
    """

    shift: int
    gaps: tuple[float, float, float]

    def require(self) -> None:
        """Check that the states fit best at the claimed positions.

        Raises:
            ValueError: they fit better one position earlier or later.
        """
        if self.shift:
            gaps = ", ".join(f"{gap:.3g}" for gap in self.gaps)
            fail(
                "teacher_hidden",
                "be the states that predict the response's tokens",
                f"states one position {'late' if self.shift > 0 else 'early'} (mean gaps {gaps} "
                "nat if 1 early, right, 1 late)",
                "take the state before each token: hidden[:, -T - 1 : -1] for the last T",
            )


@torch.no_grad()
def detect_shift(
    student_hidden: Tensor,  # (N, D)
    student_head: Tensor | LMHead,  # (V, D)
    teacher_hidden: Tensor,  # (N, D')
    teacher_head: Tensor | LMHead,  # (V, D')
    alignment: Alignment,
    *,
    temperature: float = 1.0,
) -> ShiftEvidence:
    """Find out from the states whether the teacher's are off by one position.

    Token ids and masks cannot show this, since they do not say which states were selected.  The
    test is that a teacher's probability of a token is close to the student's if its state predicts
    that token, and far from it if the state predicts the token before or after.

    Args:
        student_hidden, teacher_hidden: states that were taken at the alignment's positions,
            floating point.
        student_head, teacher_head: heads of the two sides, as weights or ``LMHead``.
        alignment: the response tokens, as ``align_responses`` returns them.
        temperature: divides both sides' logits.

    Returns:
        The best-fitting shift and the three gaps.  This reads values, so it waits for a GPU.

    Raises:
        ValueError: shapes, dtypes or devices of states and head disagree.

    Examples:
        >>> import torch, fused_sd
        >>> _ = torch.manual_seed(0)
        >>> hidden, head, ids = torch.randn(8, 16), torch.randn(100, 16), torch.randint(100, (7,))
        >>> places = fused_sd.Alignment(torch.arange(7), torch.arange(7), ids, torch.ones(7))
        >>> fused_sd.detect_shift(hidden[:7], head, hidden[:7], head, places).shift
        0
        >>> fused_sd.detect_shift(hidden[:7], head, hidden[1:], head, places).shift  # one too late
        1
    """
    check_instance("alignment", alignment, Alignment)
    check_positive("temperature", temperature)
    sides = {"student": (student_hidden, student_head), "teacher": (teacher_hidden, teacher_head)}
    for name, (hidden, head) in sides.items():
        lm_head = as_head(head, f"{name}_head")
        check_hidden(hidden, f"{name}_hidden", lm_head.weight, f"{name}_head")
        if hidden.shape[:-1] != alignment.token_ids.shape:
            rule = f"be (N, D) with N = {alignment.token_ids.numel()} as the alignment"
            remedy = f"take them at its {name}_positions"
            fail(f"{name}_hidden", rule, tuple(hidden.shape), remedy)
    adjacent = alignment.student_positions.diff() == 1
    # compare the three on the same tokens: those with a response token on either side
    middle = (adjacent[:-1] & adjacent[1:]).nonzero()[:, 0] + 1
    ids = alignment.token_ids[middle].to(student_hidden.device)
    student = _log_probs(student_hidden, student_head, middle, ids, temperature)
    gaps = []
    for shift in (-1, 0, 1):
        teacher = _log_probs(teacher_hidden, teacher_head, middle - shift, ids, temperature)
        gaps.append(float((teacher - student).abs().mean()))
    early, right, late = gaps
    shift = 0
    if min(early, late) < right:
        shift = -1 if early < late else 1
    return ShiftEvidence(shift, (early, right, late))


def _log_probs(
    hidden: Tensor, head: Tensor | LMHead, rows: Tensor, ids: Tensor, temperature: float
) -> Tensor:
    rows = rows.to(hidden.device)
    return token_log_probs(hidden[rows], head, ids, temperature=temperature).log_probs
