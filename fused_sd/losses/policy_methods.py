"""The named policy losses: GRPO, and the methods that reshape its advantages token by token.

Dimension key:  (...) tokens, D and D' hidden sizes, V and V' vocabularies, K hints
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from typing_extensions import Unpack

from fused_sd.engine.certificate import GradientKind
from fused_sd.head.projection import accumulation_dtype
from fused_sd.losses.distillation_methods import Head, Run, mean_by_default
from fused_sd.losses.output import LossOutput
from fused_sd.losses.policy import policy_loss
from fused_sd.terms.advantages import rlcsd_advantages
from fused_sd.terms.evidence import Evidence


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
    **run: Unpack[Run],
) -> LossOutput:
    """GRPO: ``-min(rho A, clip(rho) A)`` and, where asked for, k3 to a reference.

    Raises:
        ValueError: as ``policy_loss``.

    Reference:
        Shao et al., *DeepSeekMath*, arXiv 2402.03300, eq. 3.  SDPO's baseline clips (0.2, 0.28)
        without a KL.  "Token mean" is the micro-batch's in verl, the global batch's in TRL's dapo,
        each sequence's in TRL's "grpo": see ``aggregation_weights``.
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
        **mean_by_default(run),
    )


def rlsd_loss(
    hidden: Tensor,  # (..., D)
    head: Head,  # (V, D)
    token_ids: Tensor,  # (...)
    advantages: Tensor,  # (...)
    *,
    teacher: tuple[Tensor, Head] | None = None,  # (..., D') and (V', D')
    teacher_log_probs: Tensor | None = None,  # (...)
    old_log_probs: Tensor | None = None,  # (...)
    evidence: Evidence = Evidence(),  # noqa: B008, a frozen setting
    ratio_clip: tuple[float, float] | None = (0.2, 0.28),
    dual_clip: float | None = 3.0,
    **run: Unpack[Run],
) -> LossOutput:
    """RLSD: GRPO whose advantages are reweighted by what a teacher with the answer thinks of each
    token.

    ``A' = A ((1 - mix) + mix clip(exp(sign(A) (log P_T - log P_S)), 1 - low, 1 + high))`` inside
    the clipped surrogate.  Every sample has a signal.

    Args:
        teacher: hidden states and head of the teacher, at the same tokens,
        teacher_log_probs: or its log-probabilities of the tokens.
        evidence: clip, mix (lambda) and whether P_S is the current or the old policy.

    Raises:
        ValueError: as ``policy_loss``.

    Reference:
        *RLSD*, arXiv 2604.03128, eq. 13-15; eq. 16 as printed has no gradient (see ``Evidence``).
        The official code: current log-probabilities, mix 0.5, evidence clip 0.2, ratio clip
        (0.2, 0.28), dual clip 3, teacher copied every 10 (paper) or 20 (script) steps.
    """
    return policy_loss(
        hidden,
        head,
        token_ids,
        advantages,
        old_log_probs=old_log_probs,
        teacher=teacher,
        teacher_log_probs=teacher_log_probs,
        evidence=evidence,
        ratio_clip=ratio_clip,
        dual_clip=dual_clip,
        **mean_by_default(run),
    )


def rlcsd_loss(
    hidden: Tensor,  # (..., D)
    head: Head,  # (V, D)
    token_ids: Tensor,  # (...)
    advantages: Tensor,  # (...)
    correct_log_probs: Tensor,  # (...)
    wrong_log_probs: Tensor,  # (..., K)
    *,
    wrong_mask: Tensor | None = None,  # (..., K)
    token_weights: Tensor | None = None,  # (...)
    old_log_probs: Tensor | None = None,  # (...)
    selected_weight: float = 1.0,
    contrast: dict[str, Any] | None = None,
    ratio_clip: tuple[float, float] | None = (0.2, 0.2),
    temperature: float = 1.0,
    metrics: Sequence[str] = (),
    gradient: GradientKind = "dense",
    tolerance: float | None = None,
    compact: bool = True,
    backend: str = "auto",
    chunk_size: int | None = None,
    process_group: "dist.ProcessGroup | None" = None,
    reduce_dhidden: bool = True,
) -> LossOutput:
    """RLCSD: GRPO with the contrast of a correctly against wrongly hinted teachers added.

    ``mean over unselected tokens of l(A) + selected_weight * mean over selected tokens of l(A +
    r)`` with l the clipped surrogate; see ``rlcsd_advantages`` for r and the selection.

    Args:
        correct_log_probs, wrong_log_probs, wrong_mask: the teacher's log-probabilities of the
            tokens under a correct hint and under K wrong ones.
        token_weights: 0 for tokens that do not count.  The two means divide by the number of the
            others, so that the mask may carry a rollout correction, as in the official code.
        selected_weight: eta.
        contrast: keywords for ``rlcsd_advantages``; None: the official configuration's values.

    Raises:
        ValueError: as ``policy_loss``.

    Reference:
        *RLCSD*, arXiv 2606.11709; official configuration: tau_c 0.02, beta 1, lambda 0.5, delta
        0.02, eta 1, residual in [-2, 2], symmetric ratio clip 0.2, no dual clip.
    """
    shaped = rlcsd_advantages(
        advantages, correct_log_probs, wrong_log_probs, wrong_mask=wrong_mask, **(contrast or {})
    )
    mask = torch.ones_like(shaped.advantages) if token_weights is None else token_weights
    dtype = accumulation_dtype(hidden.dtype)
    weights = torch.zeros_like(mask, dtype=dtype)
    for part, scale in ((~shaped.selected, 1.0), (shaped.selected, selected_weight)):
        counted = torch.where(part, mask, 0).to(dtype)
        weights = weights + scale * counted / (counted != 0).sum().clamp(min=1)
    return policy_loss(
        hidden,
        head,
        token_ids,
        shaped.advantages,
        old_log_probs=old_log_probs,
        ratio_clip=ratio_clip,
        token_weights=weights,
        temperature=temperature,
        metrics=metrics,
        gradient=gradient,
        tolerance=tolerance,
        compact=compact,
        backend=backend,
        chunk_size=chunk_size,
        process_group=process_group,
        reduce_dhidden=reduce_dhidden,
    )
