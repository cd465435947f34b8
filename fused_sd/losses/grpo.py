"""GRPO: group-relative policy optimisation.

Dimension key:  (...) tokens, D and D' hidden sizes, V and V' vocabularies
"""

from torch import Tensor
from typing_extensions import Unpack

from fused_sd.engine.options import LossOptions, passed_on
from fused_sd.head.lm_head import Head
from fused_sd.losses.output import LossOutput
from fused_sd.losses.policy import policy_loss


def grpo_loss(
    hidden: Tensor,  # (..., D)
    head: Head,  # (V, D)
    token_ids: Tensor,  # (...)
    advantages: Tensor,  # (...)
    *,
    old_log_probs: Tensor | None = None,  # (...)
    ratio_clip: tuple[float, float] | None = (0.2, 0.2),
    dual_clip: float | None = None,
    reference_log_probs: Tensor | None = None,  # (...)
    kl_coefficient: float = 0.0,
    **options: Unpack[LossOptions],
) -> LossOutput:
    """GRPO: ``-min(rho A, clip(rho) A)`` and, where asked for, k3 to a reference.

    Args:
        hidden, head, token_ids, advantages, old_log_probs, ratio_clip, dual_clip,
            reference_log_probs, kl_coefficient: as in ``policy_loss``.
        **options: as in ``policy_loss``.

    Raises:
        ValueError: as ``policy_loss``.

    Reference:
        Shao et al., *DeepSeekMath*, arXiv 2402.03300, eq. 3.  SDPO's baseline clips (0.2, 0.28)
        without a KL.  "Token mean" is the micro-batch's in verl, the global batch's in TRL's dapo,
        each sequence's in TRL's "grpo": see ``aggregation_weights``.

    Examples:
        >>> import torch, fused_sd
        >>> hidden, head = torch.randn(4, 16), torch.randn(100, 16)
        >>> token_ids, advantages = torch.randint(100, (4,)), torch.tensor([1.0, 1.0, -0.5, -0.5])
        >>> output = fused_sd.grpo_loss(hidden, head, token_ids, advantages)
        >>> round(output.loss.item(), 3)  # fresh samples have the ratio 1: minus the mean advantage
        -0.25
    """
    return policy_loss(
        hidden,
        head,
        token_ids,
        advantages,
        old_log_probs=old_log_probs,
        ratio_clip=ratio_clip,
        dual_clip=dual_clip,
        reference_log_probs=reference_log_probs,
        kl_coefficient=kl_coefficient,
        **passed_on("grpo_loss", options, LossOptions),
    )
