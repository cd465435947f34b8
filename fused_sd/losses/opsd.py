"""OPSD: on-policy self-distillation from a teacher that sees the reference solution.

Dimension key:  (...) tokens, D and D' hidden sizes, V and V' vocabularies
"""

from typing import Any

from torch import Tensor
from typing_extensions import Unpack

from fused_sd.engine.options import passed_on
from fused_sd.head.lm_head import Head
from fused_sd.losses.divergence import DivergenceOptions, divergence_loss
from fused_sd.losses.output import LossOutput
from fused_sd.terms.divergence import Divergence
from fused_sd.terms.divergence_term import generalized_jsd
from fused_sd.terms.support import Remainder, TeacherTopK


def opsd_loss(
    student_hidden: Tensor,  # (..., D)
    student_head: Head,  # (V, D)
    teacher_hidden: Tensor,  # (..., D')
    teacher_head: Head,  # (V', D')
    *,
    beta: float | Divergence = 0.0,
    entry_clip: float | None = 0.05,
    top_k: int | None = None,
    remainder: Remainder = "renormalize",
    tail_floor: float | None = None,
    **options: Unpack[DivergenceOptions],
) -> LossOutput:
    """OPSD: forward KL to a frozen teacher that sees the reference solution, each entry clipped.

    ``sum_t sum_v min(t_v (log t_v - log s_v), entry_clip)``; it may be negative.

    Args:
        beta: the teacher's weight in the JSD's mixture: 0 is KL(t||s), 1 is KL(s||t), between
            them ``Jsd(beta)``; or a divergence in the JSD's place.
        entry_clip: bound of each vocabulary entry's term; None: no clip.
        top_k: entries of the teacher's support; None: the full vocabulary.
        remainder: of that support; RLCSD's opsd takes "tail" with top_k=100.
        tail_floor: as in ``sdpo_loss``.
        **options: as in ``divergence_loss``, token_ids and importance among them.

    Raises:
        ValueError: as ``divergence_loss``.

    Reference:
        *OPSD*, arXiv 2601.18734 (v3): forward KL, full vocabulary, clip 0.05.  The official code of
        March 2026 has no clip yet, beta 0.5, and a renormalised teacher's top-k (50 in its script).
        The clip comes before the sum over the vocabulary, which its author found better than
        clipping the sum.

    Examples:
        >>> import torch, fused_sd
        >>> _ = torch.manual_seed(0)
        >>> (student, teacher), head = torch.randn(2, 5, 16), torch.randn(100, 16)
        >>> clipped = fused_sd.opsd_loss(student, head, teacher, head)  # each entry at 0.05
        >>> whole = fused_sd.opsd_loss(student, head, teacher, head, entry_clip=None)
        >>> bool((clipped.token_loss < whole.token_loss).all())
        True
    """
    settings: dict[str, Any] = {}
    if top_k is not None:
        settings = {"support": TeacherTopK(top_k), "remainder": remainder}
    return divergence_loss(
        student_hidden,
        student_head,
        teacher_hidden,
        teacher_head,
        divergence=generalized_jsd(beta),
        entry_clip=entry_clip,
        tail_floor=tail_floor,
        **settings,
        **passed_on("opsd_loss", options, DivergenceOptions),
    )
