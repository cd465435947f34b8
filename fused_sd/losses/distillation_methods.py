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

import torch.distributed as dist
from torch import Tensor
from typing_extensions import Unpack

from fused_sd import checks
from fused_sd.engine.certificate import GradientKind
from fused_sd.head.projection import LMHead
from fused_sd.losses.divergence import divergence_loss
from fused_sd.losses.output import LossOutput, Reduction
from fused_sd.terms.divergence import MixedKl, generalized_jsd
from fused_sd.terms.support import FULL_VOCABULARY, Remainder, StudentTopK, Support, TeacherTopK
from fused_sd.terms.weighting import ImportanceCap

Head = Tensor | LMHead


class Run(TypedDict, total=False):
    """Keywords that every named loss hands on: see ``divergence_loss``."""

    token_weights: Tensor | None
    temperature: float
    teacher_temperature: float | None
    reduction: Reduction
    metrics: Sequence[str]
    gradient: GradientKind
    tolerance: float | None
    compact: bool
    backend: str
    chunk_size: int | None
    process_group: "dist.ProcessGroup | None"
    reduce_dhidden: bool


class SampledRun(Run, total=False):
    """``Run`` with what belongs to the sampled tokens: see ``divergence_loss``."""

    token_ids: Tensor | None
    importance: ImportanceCap | None


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
        tail_floor=1e-7); the paper's runs with feedback use alpha=1, top_k=20.  The code's second
        factor, the ratio of pi_old to the sampling engine's, is a factor on the weights:
        ``aggregation_weights(mask, "token_mean") * ratio`` with ``reduction="sum"``.  TRL's default
        is the sampled token instead, its top-k is renormalised.
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
        **mean_by_default(run),
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
    **run: Unpack[SampledRun],
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
        student_hidden,
        student_head,
        teacher_hidden,
        teacher_head,
        **settings,
        **mean_by_default(run),
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
    tail_floor: float | None = None,
    **run: Unpack[SampledRun],
) -> LossOutput:
    """OPSD: forward KL to a frozen teacher that sees the reference solution, each entry clipped.

    ``sum_t sum_v min(t_v (log t_v - log s_v), entry_clip)``; it may be negative.

    Args:
        beta: 0 is KL(t||s), 1 is KL(s||t), between them ``Jsd(beta)``.
        entry_clip: bound of each vocabulary entry's term; None: no clip.
        top_k: entries of the teacher's support; None: the full vocabulary.
        remainder: of that support; RLCSD's opsd takes "tail" with top_k=100.
        tail_floor: as in ``sdpo_loss``.

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
        tail_floor=tail_floor,
        **settings,
        **mean_by_default(run),
    )


def sdft_loss(
    student_hidden: Tensor,  # (..., D)
    student_head: Head,  # (V, D)
    teacher_hidden: Tensor,  # (..., D')
    teacher_head: Head,  # (V', D')
    *,
    alpha: float = 0.0,
    top_k: int | None = None,
    **run: Unpack[SampledRun],
) -> LossOutput:
    """SDFT: forward KL to a moving average of the model that sees a demonstration.

    The official code leaves out the first 3 tokens of a response (``skip_first_tokens``) and
    averages each sequence, empty ones too (``"all_sequences_mean_token_mean"``).

    Args:
        alpha: 0 is KL(t||s), 1 is KL(s||t), between them ``Jsd(alpha)``.
        top_k: None: the full vocabulary; else the student's top-k, renormalised, as in TRL (whose
            defaults are alpha=0.5, top_k=100, and ``importance`` with a cap of 2).

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
        **mean_by_default(run),
    )


def gkd_loss(
    student_hidden: Tensor,  # (..., D)
    student_head: Head,  # (V, D)
    teacher_hidden: Tensor,  # (..., D')
    teacher_head: Head,  # (V', D')
    *,
    beta: float = 0.5,
    **run: Unpack[SampledRun],
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
        **mean_by_default(run),
    )


def mean_by_default(run: Run) -> Run:
    """The caller's keywords, over the named losses' own reduction."""
    return {"reduction": "mean", **run}
