"""GKD: generalised knowledge distillation.

Dimension key:  (...) tokens, D and D' hidden sizes, V and V' vocabularies
"""

from torch import Tensor
from typing_extensions import Unpack

from fused_sd.engine.options import passed_on
from fused_sd.head.lm_head import Head
from fused_sd.losses.divergence import DivergenceOptions, divergence_loss
from fused_sd.losses.output import LossOutput
from fused_sd.terms.divergence import Divergence
from fused_sd.terms.divergence_term import generalized_jsd


def gkd_loss(
    student_hidden: Tensor,  # (..., D)
    student_head: Head,  # (V, D)
    teacher_hidden: Tensor,  # (..., D')
    teacher_head: Head,  # (V', D')
    *,
    beta: float | Divergence = 0.5,
    **options: Unpack[DivergenceOptions],
) -> LossOutput:
    """GKD: generalised JSD over the full vocabulary.

    Args:
        beta: the teacher's weight in the JSD's mixture, SDPO's and SDFT's alpha: 0 is KL(t||s), 1
            is KL(s||t), between them ``Jsd(beta)``; or a divergence in the JSD's place, such as
            ``SkewKl(0.9)``.
        **options: as in ``divergence_loss``, token_ids and importance among them.

    Raises:
        ValueError: as ``divergence_loss``.

    Reference:
        Agarwal et al., arXiv 2306.13649, eq. 1.  TRL samples at temperature 0.9 and takes its loss
        at temperature 1.

    Examples:
        >>> import math, torch, fused_sd
        >>> student, student_head = torch.randn(5, 16), torch.randn(100, 16)
        >>> teacher, teacher_head = torch.randn(5, 32), torch.randn(100, 32)  # a wider model
        >>> output = fused_sd.gkd_loss(student, student_head, teacher, teacher_head, beta=0.5)
        >>> bool((output.token_loss <= math.log(2)).all())  # however far the teacher is
        True
    """
    return divergence_loss(
        student_hidden,
        student_head,
        teacher_hidden,
        teacher_head,
        divergence=generalized_jsd(beta),
        **passed_on("gkd_loss", options, DivergenceOptions),
    )
