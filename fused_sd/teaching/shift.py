"""Whether a teacher's states are those of the tokens before or after.

Dimension key:  N response tokens, D hidden size, V vocabulary
"""

from typing import NamedTuple

import torch
from torch import Tensor

from fused_sd.checks import fail
from fused_sd.head.projection import LMHead
from fused_sd.losses.log_probs import token_log_probs
from fused_sd.teaching.align import Alignment


class ShiftEvidence(NamedTuple):
    """How well the teacher's states fit the tokens that they are to predict, and the neighbours.

    Attributes:
        shift: of the three, the one that fits best.  +1: the states lie one position late.
        gaps: mean |log t - log s| of response tokens, nats, if the states were 1 early, right or 1
            late; NaN where no response has three tokens.
    """

    shift: int
    gaps: tuple[float, float, float]

    def require(self) -> None:
        """Raise a ValueError unless the claimed positions fit best."""
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
    """Look for teacher states that are off by one.

    Ids and masks cannot show that: the states do.  A teacher is close to the student on the token
    that its state predicts, and far off on the tokens before and after.

    Args:
        student_hidden, teacher_hidden: the states that were taken, supposedly at the alignment's
            positions.
        alignment: its token ids, and which of them are neighbours.
        temperature: divides the logits of both.
    """
    adjacent = alignment.student_positions.diff() == 1
    # the same tokens for all three: those with a neighbour on either side
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
