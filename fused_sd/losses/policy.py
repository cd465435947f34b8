"""The clipped policy loss with RLSD's evidence, and divergences estimated from the sampled token.

Dimension key:  (...) tokens, D and D' hidden sizes, V and V' vocabularies
"""

from typing import Any

import torch
from torch import Tensor
from typing_extensions import Unpack

from fused_sd import checks
from fused_sd.checks import tensors as tensor_checks
from fused_sd.engine.options import LossOptions, Options
from fused_sd.head.lm_head import Head
from fused_sd.head.projection import accumulation_dtype
from fused_sd.losses.output import LossOutput
from fused_sd.losses.token import TokenLoss, apply_token_loss
from fused_sd.terms.evidence import Evidence
from fused_sd.terms.surrogate import KlEstimator, Surrogate, check_estimator
from fused_sd.terms.weighting import ImportanceCap

TokenTeacher = tuple[Tensor, Head] | None  # hidden states and head


class PolicyOptions(LossOptions, total=False):
    """``LossOptions``, and the teacher in the form that it had before ``teacher_hidden``."""

    teacher: TokenTeacher  # deprecated: pass teacher_hidden and teacher_head


def policy_loss(
    hidden: Tensor,  # (..., D)
    head: Head,  # (V, D)
    token_ids: Tensor,  # (...)
    advantages: Tensor,  # (...)
    *,
    old_log_probs: Tensor | None = None,  # (...)
    teacher_hidden: Tensor | None = None,  # (..., D')
    teacher_head: Head | None = None,  # (V', D')
    teacher_log_probs: Tensor | None = None,  # (...)
    evidence: Evidence | None = None,
    ratio_clip: tuple[float, float] | None = (0.2, 0.2),
    dual_clip: float | None = None,
    reference_log_probs: Tensor | None = None,  # (...)
    kl_coefficient: float = 0.0,
    kl_estimator: KlEstimator = "k3",
    **options: Unpack[PolicyOptions],
) -> LossOutput:
    """GRPO's clipped policy loss, with RLSD's evidence from a teacher and a KL to a reference.

    ``-min(rho A', clip(rho, 1 - low, 1 + high) A') + kl_coefficient KL`` for each token, where
    ``rho = pi / pi_old`` and ``A' = A ((1 - mix) + mix w)`` with the evidence's weight w, or A
    without it.  One run over the chunks forms the student's log-probability, the teacher's, weight,
    ratio, loss and gradient.

    Args:
        hidden, head: the policy's states and lm_head.
        token_ids: int64 sampled tokens.
        advantages: A, without gradient.
        old_log_probs: of the policy that sampled, nats; None: the current one (ratio 1).
        teacher_hidden, teacher_head: states and head of the evidence's teacher; or
        teacher_log_probs: the teacher's log-probabilities of the tokens, nats.
        evidence: RLSD's settings; None: advantages as they are.
        ratio_clip: (low, high); None: no clip.
        dual_clip: bound c > 1 on the loss of tokens with A' < 0: at most ``-c A'``.
        reference_log_probs: of the reference policy, nats, for the KL.
        kl_coefficient: weight of the KL to the reference.
        kl_estimator: ``"k1"`` as ``sg(d) log_prob``, ``"k2"`` or ``"k3"`` of d = log_prob -
            reference.  The gradients of k1 and k2 are in expectation that of KL(policy||reference),
            k3's that of KL(reference||policy).
        **options: as in ``divergence_loss``.  A token of weight 0 contributes exactly 0, and so
            does one of advantage 0 without a KL; where no metrics are asked for, the logits of
            neither are computed.  Metrics are of "student_log_prob", "teacher_log_prob",
            "evidence" (delta), "evidence_weight", "evidence_clip_fraction", "importance_ratio",
            "ratio_clip_fraction", "reference_kl", "student_entropy".  Deprecated names:
            ``teacher=(hidden, head)``, and the metrics "log_prob", "ratio", "entropy".

    Returns:
        Loss, token losses and metrics.

    Raises:
        ValueError: shapes, dtypes or devices disagree, the teacher is missing or given twice, or a
            divergence is passed as advantage.

    Reference:
        Shao et al., *DeepSeekMath* (GRPO), arXiv 2402.03300, eq. 3; Ye et al. (dual clip), arXiv
        1912.09729; RLSD, arXiv 2604.03128, eq. 13-15.

    Examples:
        >>> import torch, fused_sd
        >>> hidden, head = torch.randn(3, 16, requires_grad=True), torch.randn(100, 16)
        >>> token_ids, advantages = torch.tensor([3, 5, 8]), torch.ones(3)
        >>> old = fused_sd.token_log_probs(hidden, head, token_ids).log_probs.detach() - 1
        >>> output = fused_sd.policy_loss(
        ...     hidden, head, token_ids, advantages, old_log_probs=old, reduction="mean"
        ... )
        >>> output.loss.backward()
        >>> round(output.loss.item(), 3), hidden.grad.count_nonzero().item()  # clipped
        (-1.2, 0)
    """
    if isinstance(advantages, LossOutput):
        checks.fail(
            "advantages",
            "not be a divergence: summed over the vocabulary it does not depend on the sampled "
            "token, so its expected policy gradient is 0",
            "a LossOutput",
            "add its loss to the policy loss and differentiate both",
        )
    tensor_checks.check_tensor("hidden", hidden)
    tensor_checks.check_tensor("token_ids", token_ids)
    tensor_checks.check_tensor("advantages", advantages)
    teacher, chosen = _teacher_and_options("policy_loss", teacher_hidden, teacher_head, options)
    if evidence is not None:
        checks.check_instance("evidence", evidence, Evidence)
    check_teacher_of_tokens(evidence is not None, teacher, teacher_log_probs)
    checks.check_non_negative("kl_coefficient", kl_coefficient, "pass 0 for no KL")
    settings = Surrogate(
        ratio_clip=ratio_clip,
        dual_clip=dual_clip,
        evidence_clip=None if evidence is None else evidence.clip,
        evidence_from_old=evidence is not None and evidence.log_prob == "old",
        kl_coefficient=float(kl_coefficient),
        kl_estimator=kl_estimator,
    )
    if bool(kl_coefficient) != (reference_log_probs is not None):
        is_given = "missing" if reference_log_probs is None else "given"
        got = f"kl_coefficient={kl_coefficient!r}, reference {is_given}"
        rule = "come together with kl_coefficient > 0"
        checks.fail("reference_log_probs", rule, got, "pass both or neither")
    metrics = ["student_log_prob", "student_entropy", "importance_ratio", "ratio_clip_fraction"]
    inputs = {"token_ids": token_ids, "advantages": advantages}
    if old_log_probs is not None:
        inputs["old_log_probs"] = old_log_probs
    if evidence is not None:
        metrics += ["evidence", "evidence_weight", "evidence_clip_fraction", "teacher_log_prob"]
        inputs["mix"] = _mix(evidence, hidden)
        if evidence.log_prob == "old" and old_log_probs is None:
            remedy = "pass old_log_probs, or Evidence(log_prob='current')"
            rule = 'be "current" without old_log_probs'
            checks.fail("evidence.log_prob", rule, "'old'", remedy)
    if teacher_log_probs is not None:
        inputs["teacher_log_probs"] = teacher_log_probs
    if reference_log_probs is not None:
        metrics.append("reference_kl")
        inputs["reference_log_probs"] = reference_log_probs
    loss = TokenLoss(settings, inputs, tuple(metrics))
    return apply_token_loss(loss, hidden, head, teacher, chosen)


def sampled_kl_loss(
    hidden: Tensor,  # (..., D)
    head: Head,  # (V, D)
    token_ids: Tensor,  # (...)
    *,
    teacher_hidden: Tensor | None = None,  # (..., D')
    teacher_head: Head | None = None,  # (V', D')
    teacher_log_probs: Tensor | None = None,  # (...)
    estimator: KlEstimator = "k1",
    importance: ImportanceCap | None = None,
    **options: Unpack[PolicyOptions],
) -> LossOutput:
    """A divergence estimated from the sampled token alone: TRL's default SDPO, verl's k1 to k3.

    With ``d = log P_S - log P_T`` of the token: ``"k1"`` is ``sg(d) log P_S`` (the gradient of
    KL(s||t) in expectation; d itself, differentiated, would not see the teacher and is refused),
    ``"k2"`` is ``d^2 / 2`` (the same gradient) and ``"k3"`` is ``exp(-d) + d - 1`` (that of
    KL(t||s)).

    Args:
        hidden, head: the student's states and lm_head.
        token_ids: int64, sampled from the student.
        teacher_hidden, teacher_head: states and head of the teacher; or
        teacher_log_probs: the teacher's log-probabilities of the tokens, nats.
        estimator: of the divergence.
        importance: multiplies each token by its capped importance ratio.
        **options: as in ``policy_loss``.  Metrics are of "student_log_prob", "teacher_log_prob",
            "reference_kl" (k3), "student_entropy".

    Returns:
        Loss, token losses and metrics.

    Raises:
        ValueError: as ``policy_loss``.

    Reference:
        SDPO, arXiv 2601.20802, its official code without full-logit distillation; Schulman,
        *Approximating KL Divergence*, 2020.

    Examples:
        >>> import torch, fused_sd
        >>> hidden, head, token_ids = torch.randn(3, 16), torch.randn(100, 16), torch.arange(3)
        >>> given = {"hidden": hidden, "head": head, "token_ids": token_ids}
        >>> teacher = fused_sd.token_log_probs(**given).log_probs - 1  # d is 1
        >>> given |= {"teacher_log_probs": teacher, "reduction": "mean"}
        >>> k2, k3 = (fused_sd.sampled_kl_loss(**given, estimator=k).loss for k in ("k2", "k3"))
        >>> round(k2.item(), 3), round(k3.item(), 3)
        (0.5, 0.368)
    """
    tensor_checks.check_tensor("hidden", hidden)
    tensor_checks.check_tensor("token_ids", token_ids)
    teacher, chosen = _teacher_and_options("sampled_kl_loss", teacher_hidden, teacher_head, options)
    if teacher is None and teacher_log_probs is None:
        remedy = "pass teacher_hidden and teacher_head, or teacher_log_probs"
        checks.fail("teacher_hidden", "be given, or teacher_log_probs", "neither", remedy)
    check_teacher_of_tokens(True, teacher, teacher_log_probs)
    check_estimator("estimator", estimator)
    no_advantages = hidden.new_zeros(hidden.shape[:-1], dtype=torch.float32)
    inputs = {"token_ids": token_ids, "advantages": no_advantages}
    if importance is not None:
        checks.check_instance("importance", importance, ImportanceCap)
        inputs["old_log_probs"] = importance.old_log_probs
    if teacher_log_probs is not None:
        inputs["teacher_log_probs"] = teacher_log_probs
    settings = Surrogate(
        kl_coefficient=1.0,
        kl_estimator=estimator,
        importance_cap=None if importance is None else importance.cap,
    )
    metrics = "student_log_prob", "teacher_log_prob", "reference_kl", "student_entropy"
    loss = TokenLoss(settings, inputs, metrics)
    return apply_token_loss(loss, hidden, head, teacher, chosen)


def check_teacher_of_tokens(
    is_read: bool, teacher: TokenTeacher, teacher_log_probs: Tensor | None
) -> None:
    """Check that the teacher is given once where it is read, and not at all elsewhere."""
    if teacher is not None and teacher_log_probs is not None:
        checks.fail(
            "teacher",
            "be given once",
            "teacher_hidden and teacher_log_probs",
            "pass its states and head, or its log-probabilities",
        )
    is_given = teacher is not None or teacher_log_probs is not None
    if is_read and not is_given:
        remedy = "pass teacher_hidden and teacher_head, or teacher_log_probs"
        checks.fail("evidence", "come with a teacher", "none", remedy)
    if is_given and not is_read:
        checks.fail("teacher", "come with evidence", "none", "pass evidence=Evidence(...)")


def _teacher_and_options(
    call: str, hidden: Tensor | None, head: Head | None, options: Any
) -> tuple[TokenTeacher, Options]:
    """The teacher's states and head, in whichever form the caller gave them, and the options."""
    old: TokenTeacher = options.pop("teacher", None)
    chosen = Options.of(call, options)
    if old is not None:
        checks.deprecated(
            "teacher=(hidden, head) is now teacher_hidden=hidden, teacher_head=head, as in "
            "divergence_loss"
        )
        if hidden is not None or head is not None:
            checks.fail("teacher", "be given once", "twice", "pass teacher_hidden, teacher_head")
        return old, chosen
    if (hidden is None) != (head is None):
        missing = "teacher_head" if head is None else "teacher_hidden"
        rule, remedy = "come with the other one", "pass the teacher's states and its head"
        checks.fail(missing, rule, "None", remedy)
    return None if hidden is None or head is None else (hidden, head), chosen


def _mix(evidence: Evidence, hidden: Tensor) -> Tensor:
    """The share of the evidence of each token (...)."""
    dtype, tokens = accumulation_dtype(hidden.dtype), hidden.shape[:-1]
    if isinstance(evidence.mix, Tensor):
        tensor_checks.check_leading("evidence.mix", evidence.mix, tokens, "hidden")
        return evidence.mix.to(dtype)
    return hidden.new_full(tokens, evidence.mix, dtype=dtype)
