"""SD-Zero: the second phase of self-distillation from a reviser.

Dimension key:  (...) tokens, D and D' hidden sizes, V and V' vocabularies
"""

from typing import Any, Literal

from torch import Tensor
from typing_extensions import Unpack

from fused_sd import checks
from fused_sd.engine.options import passed_on
from fused_sd.head.lm_head import Head
from fused_sd.losses.divergence import DivergenceOptions, divergence_loss
from fused_sd.losses.output import LossOutput
from fused_sd.terms.divergence import MixedKl
from fused_sd.terms.support import TeacherTopK


def sd_zero_loss(
    student_hidden: Tensor,  # (..., D)
    student_head: Head,  # (V, D)
    teacher_hidden: Tensor,  # (..., D')
    teacher_head: Head,  # (V', D')
    *,
    variant: Literal["code", "paper"] = "code",
    top_k: int = 64,
    forward_weight: float = 0.5,
    **options: Unpack[DivergenceOptions],
) -> LossOutput:
    """SD-Zero's second phase: the generator learns from the reviser's distributions.

    The teacher read the question, the student's own response and a verdict phrase; it is frozen at
    the end of phase 1 (which is ``cross_entropy_loss``) and replaced at plateaus.

    Args:
        variant: ``"code"``: ``forward_weight KL(t||s) + (1 - forward_weight) KL(s||t)`` over the
            teacher's top-k, both sides renormalised.  ``"paper"``: KL(s||t), full vocabulary.
        top_k: entries of the teacher's support, in the code's variant.
        forward_weight: share of KL(t||s), in the code's variant.
        **options: as in ``divergence_loss``, token_ids and importance among them.

    Raises:
        ValueError: as ``divergence_loss``.

    Reference:
        *SD-Zero*, arXiv 2604.12002, the objective of phase 2.  Paper and code differ: the paper
        writes KL(s||t) (and calls it forward), the official configuration is the mixture with
        weight 0.5 on the teacher's top 64, averaged over all tokens of the global batch.

    Examples:
        >>> import torch, fused_sd
        >>> (generator, reviser), head = torch.randn(2, 5, 16), torch.randn(100, 16)
        >>> paper = fused_sd.sd_zero_loss(generator, head, reviser, head, variant="paper")
        >>> reverse = fused_sd.gkd_loss(generator, head, reviser, head, beta=1)  # KL(s||t)
        >>> torch.equal(paper.loss, reverse.loss)
        True
    """
    checks.check_one_of("variant", variant, ("code", "paper"))
    settings: dict[str, Any] = {"divergence": "reverse_kl"}
    if variant == "code":
        settings = {
            "divergence": MixedKl(forward_weight),
            "support": TeacherTopK(top_k),
            "remainder": "renormalize",
        }
    return divergence_loss(
        student_hidden,
        student_head,
        teacher_hidden,
        teacher_head,
        **settings,
        **passed_on("sd_zero_loss", options, DivergenceOptions),
    )
