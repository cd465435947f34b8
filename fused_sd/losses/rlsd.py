"""RLSD: self-distilled reinforcement learning with verifiable rewards.

Dimension key:  (...) tokens, D and D' hidden sizes, V and V' vocabularies
"""

from torch import Tensor
from typing_extensions import Unpack

from fused_sd.engine.options import passed_on
from fused_sd.head.lm_head import Head
from fused_sd.losses.output import LossOutput
from fused_sd.losses.policy import PolicyOptions, policy_loss
from fused_sd.terms.evidence import Evidence


def rlsd_loss(
    hidden: Tensor,  # (..., D)
    head: Head,  # (V, D)
    token_ids: Tensor,  # (...)
    advantages: Tensor,  # (...)
    *,
    teacher_hidden: Tensor | None = None,  # (..., D')
    teacher_head: Head | None = None,  # (V', D')
    teacher_log_probs: Tensor | None = None,  # (...)
    old_log_probs: Tensor | None = None,  # (...)
    evidence: Evidence = Evidence(),  # noqa: B008, a frozen setting
    ratio_clip: tuple[float, float] | None = (0.2, 0.28),
    dual_clip: float | None = 3.0,
    **options: Unpack[PolicyOptions],
) -> LossOutput:
    """RLSD: GRPO, with each token's advantage reweighted by a teacher that knows the answer.

    ``A' = A ((1 - mix) + mix clip(exp(sign(A) (log P_T - log P_S)), 1 - low, 1 + high))`` inside
    the clipped surrogate.  Every sample has a signal.

    Args:
        hidden, head, token_ids, advantages, old_log_probs, ratio_clip, dual_clip: as in
            ``policy_loss``.
        teacher_hidden, teacher_head: the teacher's states at the same tokens, and its head; or
        teacher_log_probs: the teacher's log-probabilities of the tokens, nats.
        evidence: clip, mix (lambda) and whether P_S is the current or the old policy.
        **options: as in ``policy_loss``.

    Raises:
        ValueError: as ``policy_loss``.

    Reference:
        *RLSD*, arXiv 2604.03128, eq. 13-15; eq. 16 as printed has no gradient (see ``Evidence``).
        The official code: current log-probabilities, mix 0.5, evidence clip 0.2, ratio clip
        (0.2, 0.28), dual clip 3, teacher copied every 10 (paper) or 20 (script) steps.

    Examples:
        >>> import torch, fused_sd
        >>> hidden, head, token_ids = torch.randn(2, 16), torch.randn(100, 16), torch.tensor([3, 5])
        >>> own = fused_sd.token_log_probs(hidden, head, token_ids).log_probs
        >>> output = fused_sd.rlsd_loss(
        ...     hidden, head, token_ids, torch.tensor([1.0, -1.0]), teacher_log_probs=own + 1,
        ...     metrics=("evidence_weight",),
        ... )
        >>> output.metrics["evidence_weight"]  # the better liked are praised more, and blamed less
        tensor([1.2000, 0.8000])
    """
    return policy_loss(
        hidden,
        head,
        token_ids,
        advantages,
        old_log_probs=old_log_probs,
        teacher_hidden=teacher_hidden,
        teacher_head=teacher_head,
        teacher_log_probs=teacher_log_probs,
        evidence=evidence,
        ratio_clip=ratio_clip,
        dual_clip=dual_clip,
        **passed_on("rlsd_loss", options, PolicyOptions),
    )
