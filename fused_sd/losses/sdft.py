"""SDFT: self-distillation fine-tuning from a teacher that sees a demonstration.

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
from fused_sd.terms.support import StudentTopK


def sdft_loss(
    student_hidden: Tensor,  # (..., D)
    student_head: Head,  # (V, D)
    teacher_hidden: Tensor,  # (..., D')
    teacher_head: Head,  # (V', D')
    *,
    alpha: float | Divergence = 0.0,
    top_k: int | None = None,
    **options: Unpack[DivergenceOptions],
) -> LossOutput:
    """SDFT: forward KL to a moving average of the model that sees a demonstration.

    The official code leaves out the first 3 tokens of a response (``skip_first_tokens``) and
    averages each sequence, empty ones too (``"all_sequences_mean_token_mean"``).

    Args:
        alpha: the teacher's weight in the JSD's mixture, GKD's beta: 0 is KL(t||s), 1 is
            KL(s||t), between them ``Jsd(alpha)``; or a divergence in the JSD's place.
        top_k: None: the full vocabulary; else the student's top-k, renormalised, as in TRL (whose
            defaults are alpha=0.5, top_k=100, and ``importance`` with a cap of 2).
        **options: as in ``divergence_loss``, token_ids and importance among them.

    Raises:
        ValueError: as ``divergence_loss``.

    Reference:
        *SDFT*, arXiv 2601.19897: its first version writes KL(s||t), while its code and all its
        results are KL(t||s), as its second version says.

    Examples:
        >>> import torch, fused_sd
        >>> _ = torch.manual_seed(0)
        >>> (student, teacher), head = torch.randn(2, 1, 6, 16), torch.randn(100, 16)
        >>> mask = torch.tensor([[1, 1, 1, 1, 1, 0]])  # a response of 5 tokens, and padding
        >>> weights = fused_sd.skip_first_tokens(mask, 3).float()
        >>> output = fused_sd.sdft_loss(student, head, teacher, head, token_weights=weights)
        >>> output.token_loss != 0
        tensor([[False, False, False,  True,  True, False]])
    """
    settings: dict[str, Any] = {}
    if top_k is not None:
        settings = {"support": StudentTopK(top_k), "remainder": "renormalize"}
    return divergence_loss(
        student_hidden,
        student_head,
        teacher_hidden,
        teacher_head,
        divergence=generalized_jsd(alpha, "alpha"),
        **settings,
        **passed_on("sdft_loss", options, DivergenceOptions),
    )
