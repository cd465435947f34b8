"""SDPO: self-distillation policy optimisation.

A public loss turns a paper's settings into a divergence, a support and weights, and calls
``divergence_loss`` (``losses/divergence.py``).  The other divergence methods in this folder do the
same; the losses of the sampled token call ``policy_loss`` (``losses/policy.py``).  SDPO's default,
a top-k with a tail, takes the branch of ``objectives/truncated.py``.

Dimension key:  (...) tokens, D and D' hidden sizes, V and V' vocabularies
"""

from torch import Tensor
from typing_extensions import Unpack

from fused_sd import checks
from fused_sd.engine.options import LossOptions, passed_on
from fused_sd.head.lm_head import Head
from fused_sd.losses.divergence import divergence_loss
from fused_sd.losses.output import LossOutput
from fused_sd.terms.divergence import Divergence
from fused_sd.terms.divergence_term import generalized_jsd
from fused_sd.terms.support import FULL_VOCABULARY, Remainder, StudentTopK, Support
from fused_sd.terms.weighting import ImportanceCap


def sdpo_loss(
    student_hidden: Tensor,  # (..., D)
    student_head: Head,  # (V, D)
    teacher_hidden: Tensor,  # (..., D')
    teacher_head: Head,  # (V', D')
    *,
    alpha: float | Divergence = 0.5,
    top_k: int | None = 100,
    add_tail: bool = True,
    tail_floor: float | None = None,
    token_ids: Tensor | None = None,  # (...)
    old_log_probs: Tensor | None = None,  # (...)
    importance_cap: float | None = 2.0,
    **options: Unpack[LossOptions],
) -> LossOutput:
    """SDPO: divergence to the self-teacher over the student's top-k and a tail bucket.

    ``sum_t min(pi / pi_old, cap) D_alpha(student || teacher over top-k(student) + tail)``.  The
    teacher is the same model, or its moving average, that has seen feedback or a successful
    sibling.

    Args:
        alpha: the teacher's weight in the JSD's mixture, GKD's beta: 0 is KL(t||s), 1 is
            KL(s||t), between them ``Jsd(alpha)``; or a divergence in the JSD's place.
        top_k: entries of the student's support; None: the full vocabulary.
        add_tail: True: one bucket for the rest; False: both sides are renormalised over the
            support.
        tail_floor: 1e-7 for the official code's clamp; None for the exact tail.
        token_ids, old_log_probs: of the sampled tokens, for the importance ratio; without
            old_log_probs (a single update on fresh samples) the ratio is 1.
        importance_cap: largest ratio; None: no ratio.
        **options: as in ``divergence_loss``.

    Raises:
        ValueError: as ``divergence_loss``.

    Reference:
        Huebotter et al., *Reinforcement Learning via Self-Distillation*, arXiv 2601.20802, eq. 1 is
        alpha=1 over the full vocabulary.  The official configuration is what the defaults are (with
        tail_floor=1e-7); the paper's runs with feedback use alpha=1, top_k=20.  The code's second
        factor, the ratio of pi_old to the sampling engine's, is a factor on the weights:
        ``aggregation_weights(mask, "token_mean") * ratio`` with ``reduction="sum"``.  TRL's default
        is the sampled token instead, its top-k is renormalised.

    Examples:
        >>> import torch, fused_sd
        >>> _ = torch.manual_seed(0)
        >>> head = torch.randn(200, 16)  # (vocabulary, hidden size)
        >>> hidden = torch.randn(6, 16, requires_grad=True)  # of 6 response tokens
        >>> informed = hidden.detach() + 0.1 * torch.randn(6, 16)  # behind a longer prompt
        >>> output = fused_sd.sdpo_loss(hidden, head, informed, head, alpha=0.5, top_k=20)
        >>> output.loss.backward()
        >>> output.token_loss.shape, hidden.grad.shape
        (torch.Size([6]), torch.Size([6, 16]))
    """
    checks.check_bool("add_tail", add_tail)
    if importance_cap is not None:
        checks.check_positive("importance_cap", importance_cap, "pass None for no importance ratio")
    support: Support = FULL_VOCABULARY if top_k is None else StudentTopK(top_k)
    remainder: Remainder = "tail" if add_tail or top_k is None else "renormalize"
    importance = None
    if old_log_probs is not None and importance_cap is not None:
        importance = ImportanceCap(old_log_probs, importance_cap)
    return divergence_loss(
        student_hidden,
        student_head,
        teacher_hidden,
        teacher_head,
        divergence=generalized_jsd(alpha, "alpha"),
        support=support,
        remainder=remainder,
        tail_floor=tail_floor,
        token_ids=token_ids,
        importance=importance,
        **passed_on("sdpo_loss", options, LossOptions),
    )
