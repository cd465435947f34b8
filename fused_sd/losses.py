"""The named losses: each is a divergence, a support and weights, or a policy term, as its paper
sets them.

Every function takes what its generic counterpart takes (``divergence_loss``, ``policy_loss``) and
fills in the method's settings; ``reduction`` is "mean" here, the official codes' mean over the
micro-batch's tokens.  Other averages are weights from ``aggregation_weights`` with
``reduction="sum"``.

Dimension key:  (...) tokens, D and D' hidden sizes, V and V' vocabularies, K hints
"""

from collections.abc import Sequence
from typing import Any, Literal, TypedDict

import torch
from torch import Tensor
from typing_extensions import Unpack

from fused_sd import checks
from fused_sd.distill import divergence_loss
from fused_sd.divergence import MixedKl, generalized_jsd
from fused_sd.heads import LMHead, accumulation_dtype
from fused_sd.loss_output import LossOutput, Reduction
from fused_sd.support import FULL_VOCABULARY, Remainder, StudentTopK, Support, TeacherTopK
from fused_sd.tokens import policy_loss
from fused_sd.weighting import Evidence, ImportanceCap, rlcsd_advantages

Head = Tensor | LMHead


class Run(TypedDict, total=False):
    """Keywords that every named loss hands on: see ``divergence_loss``."""

    token_weights: Tensor | None
    temperature: float
    teacher_temperature: float | None
    reduction: Reduction
    metrics: Sequence[str]
    compact: bool
    backend: str
    chunk_size: int | None


def sdpo_loss(
    student_hidden: Tensor,  # (..., D)
    student_head: Head,  # (V, D)
    teacher_hidden: Tensor,  # (..., D')
    teacher_head: Head,  # (V', D')
    *,
    alpha: float = 0.5,
    top_k: int | None = 100,
    add_tail: bool = True,
    tail_floor: float | None = None,
    token_ids: Tensor | None = None,  # (...)
    old_log_probs: Tensor | None = None,  # (...)
    importance_cap: float | None = 2.0,
    **run: Unpack[Run],
) -> LossOutput:
    """SDPO: divergence to the self-teacher over the student's top-k and a tail bucket.

    ``sum_t min(pi / pi_old, cap) D_alpha(student || teacher over top-k(student) + tail)``, where
    the teacher is the same model (its moving average) that has seen feedback or a successful
    sibling.

    Args:
        alpha: 0 is KL(t||s), 1 is KL(s||t), between them ``Jsd(alpha)``.
        top_k: entries of the student's support; None: the full vocabulary.
        add_tail: one bucket for the rest, or renormalise over the support.
        tail_floor: 1e-7 for the official code's clamp; None for the exact tail.
        token_ids, old_log_probs: of the sampled tokens, for the importance ratio; without
            old_log_probs (a single update on fresh samples) the ratio is 1.
        importance_cap: largest ratio; None: no ratio.

    Raises:
        ValueError: as ``divergence_loss``.

    Reference:
        Huebotter et al., *Reinforcement Learning via Self-Distillation*, arXiv 2601.20802, eq. 1 is
        alpha=1 over the full vocabulary.  The official configuration is what the defaults are (with
        tail_floor=1e-7); the paper's runs with feedback use alpha=1, top_k=20.  TRL's default is
        the sampled token instead, its top-k is renormalised.
    """
    support: Support = FULL_VOCABULARY if top_k is None else StudentTopK(top_k)
    truncated: Remainder = "tail" if add_tail else "renormalize"
    importance = None
    if old_log_probs is not None and importance_cap is not None:
        importance = ImportanceCap(old_log_probs, importance_cap)
    return divergence_loss(
        student_hidden,
        student_head,
        teacher_hidden,
        teacher_head,
        divergence=generalized_jsd(alpha),
        support=support,
        remainder="tail" if top_k is None else truncated,
        tail_floor=tail_floor,
        token_ids=token_ids,
        importance=importance,
        **_mean(run),
    )


def sd_zero_loss(
    student_hidden: Tensor,  # (..., D)
    student_head: Head,  # (V, D)
    teacher_hidden: Tensor,  # (..., D')
    teacher_head: Head,  # (V', D')
    *,
    variant: Literal["code", "paper"] = "code",
    top_k: int = 64,
    forward_weight: float = 0.5,
    **run: Unpack[Run],
) -> LossOutput:
    """SD-Zero's second phase: the generator learns from the reviser's distributions.

    The teacher read the question, the student's own response and a verdict phrase; it is frozen at
    the end of phase 1 (which is ``cross_entropy_loss``) and replaced at plateaus.

    Args:
        variant: ``"code"``: ``forward_weight KL(t||s) + (1 - forward_weight) KL(s||t)`` over the
            teacher's top-k, both sides renormalised.  ``"paper"``: KL(s||t), full vocabulary.
        top_k, forward_weight: of the code's variant.

    Raises:
        ValueError: as ``divergence_loss``.

    Reference:
        *SD-Zero*, arXiv 2604.12002, the objective of phase 2.  Paper and code part: the paper
        writes KL(s||t) (and calls it forward), the official configuration is the mixture with
        weight 0.5 on the teacher's top 64, averaged over all tokens of the global batch.
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
        student_hidden, student_head, teacher_hidden, teacher_head, **settings, **_mean(run)
    )


def opsd_loss(
    student_hidden: Tensor,  # (..., D)
    student_head: Head,  # (V, D)
    teacher_hidden: Tensor,  # (..., D')
    teacher_head: Head,  # (V', D')
    *,
    beta: float = 0.0,
    entry_clip: float | None = 0.05,
    top_k: int | None = None,
    remainder: Remainder = "renormalize",
    **run: Unpack[Run],
) -> LossOutput:
    """OPSD: forward KL to a frozen teacher that sees the reference solution, each entry clipped.

    ``sum_t sum_v min(t_v (log t_v - log s_v), entry_clip)``; it may be negative.

    Args:
        beta: 0 is KL(t||s), 1 is KL(s||t), between them ``Jsd(beta)``.
        entry_clip: bound of each vocabulary entry's term; None: no clip.
        top_k: entries of the teacher's support; None: the full vocabulary.
        remainder: of that support; RLCSD's opsd takes "tail" with top_k=100.

    Raises:
        ValueError: as ``divergence_loss``.

    Reference:
        *OPSD*, arXiv 2601.18734 (v3): forward KL, full vocabulary, clip 0.05.  The official code of
        March 2026 has no clip yet, beta 0.5, and a renormalised teacher's top-k (50 in its script).
        The clip is before the vocabulary's sum, which its author found better than after it.
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
        **settings,
        **_mean(run),
    )


def sdft_loss(
    student_hidden: Tensor,  # (..., D)
    student_head: Head,  # (V, D)
    teacher_hidden: Tensor,  # (..., D')
    teacher_head: Head,  # (V', D')
    *,
    alpha: float = 0.0,
    top_k: int | None = None,
    **run: Unpack[Run],
) -> LossOutput:
    """SDFT: forward KL to a moving average of the model that sees a demonstration.

    The official code leaves out the first 3 tokens of a response (``skip_first_tokens``) and
    averages each sequence, empty ones too (``"all_sequences_mean_token_mean"``).

    Args:
        alpha: 0 is KL(t||s), 1 is KL(s||t), between them ``Jsd(alpha)``.
        top_k: None: the full vocabulary; else the student's top-k, renormalised, as in TRL (whose
            defaults are alpha=0.5, top_k=100).

    Raises:
        ValueError: as ``divergence_loss``.

    Reference:
        *SDFT*, arXiv 2601.19897: its first version writes KL(s||t), while its code and all its
        results are KL(t||s), as its second version says.
    """
    settings: dict[str, Any] = {}
    if top_k is not None:
        settings = {"support": StudentTopK(top_k), "remainder": "renormalize"}
    return divergence_loss(
        student_hidden,
        student_head,
        teacher_hidden,
        teacher_head,
        divergence=generalized_jsd(alpha),
        **settings,
        **_mean(run),
    )


def gkd_loss(
    student_hidden: Tensor,  # (..., D)
    student_head: Head,  # (V, D)
    teacher_hidden: Tensor,  # (..., D')
    teacher_head: Head,  # (V', D')
    *,
    beta: float = 0.5,
    **run: Unpack[Run],
) -> LossOutput:
    """GKD: generalised JSD over the full vocabulary.

    Args:
        beta: weight of the teacher in the mixture; 0 is KL(t||s), 1 is KL(s||t): the trainers' end
            points, where the divergence itself would tend to 0.

    Raises:
        ValueError: as ``divergence_loss``.

    Reference:
        Agarwal et al., arXiv 2306.13649, eq. 1.  TRL samples at temperature 0.9 and takes its loss
        at temperature 1.
    """
    return divergence_loss(
        student_hidden,
        student_head,
        teacher_hidden,
        teacher_head,
        divergence=generalized_jsd(beta),
        **_mean(run),
    )


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
        **_mean(run),
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
        The
        official code: current log-probabilities, mix 0.5, evidence clip 0.2, ratio clip (0.2,
            0.28),
        dual clip 3, teacher copied every 10 (paper) or 20 (script) steps.
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
        **_mean(run),
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
    compact: bool = True,
    backend: str = "auto",
    chunk_size: int | None = None,
) -> LossOutput:
    """RLCSD: GRPO with the contrast of a correctly against wrongly hinted teachers added.

    ``mean over unselected tokens of l(A) + selected_weight * mean over selected tokens of l(A +
    r)`` with l the clipped surrogate; see ``rlcsd_advantages`` for r and the selection.

    Args:
        correct_log_probs, wrong_log_probs, wrong_mask: the teacher's log-probabilities of the
            tokens under a correct hint and under K wrong ones.
        token_weights: mask of the tokens that count; the two means are of these.
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
        weights = weights + scale * counted / counted.sum().clamp(min=1)
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
        compact=compact,
        backend=backend,
        chunk_size=chunk_size,
    )


def _mean(run: Run) -> Run:
    """The caller's keywords, over the named losses' own reduction."""
    return {"reduction": "mean", **run}
