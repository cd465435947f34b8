"""The clipped policy loss with RLSD's evidence, and divergences estimated from the sampled token.

Dimension key:  (...) tokens, D and D' hidden sizes, V and V' vocabularies
"""

from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from fused_sd import checks
from fused_sd.checks import tensors as tensor_checks
from fused_sd.engine.certificate import GradientKind
from fused_sd.engine.options import execution
from fused_sd.head.projection import LMHead, accumulation_dtype
from fused_sd.losses.output import LossOutput, Reduction
from fused_sd.losses.token import token_loss
from fused_sd.terms.evidence import Evidence
from fused_sd.terms.surrogate import Surrogate
from fused_sd.terms.weighting import ImportanceCap

KlEstimator = Literal["k1", "k2", "k3"]


def policy_loss(
    hidden: Tensor,  # (..., D)
    head: Tensor | LMHead,  # (V, D)
    token_ids: Tensor,  # (...)
    advantages: Tensor,  # (...)
    *,
    old_log_probs: Tensor | None = None,  # (...)
    teacher: tuple[Tensor, Tensor | LMHead] | None = None,  # (..., D') and (V', D')
    teacher_log_probs: Tensor | None = None,  # (...)
    evidence: Evidence | None = None,
    ratio_clip: tuple[float, float] | None = (0.2, 0.2),
    dual_clip: float | None = None,
    reference_log_probs: Tensor | None = None,  # (...)
    kl_coefficient: float = 0.0,
    kl_estimator: KlEstimator = "k3",
    token_weights: Tensor | None = None,  # (...)
    temperature: float = 1.0,
    teacher_temperature: float | None = None,
    reduction: Reduction = "sum",
    metrics: Sequence[str] = (),
    gradient: GradientKind = "dense",
    tolerance: float | None = None,
    compact: bool = True,
    backend: str = "auto",
    chunk_size: int | None = None,
    process_group: "dist.ProcessGroup | None" = None,
    reduce_dhidden: bool = True,
) -> LossOutput:
    """GRPO's clipped policy loss, with RLSD's evidence from a teacher and a KL to a reference.

    ``-min(rho A', clip(rho, 1 - low, 1 + high) A') + kl_coefficient KL`` for each token, where
    ``rho = pi / pi_old`` and ``A' = A ((1 - mix) + mix w)`` with the evidence's weight w, or A
    without it. Student log-probability, teacher log-probability, weight, ratio, loss and gradient
    come out of one walk over the chunks.

    Args:
        hidden, head: the policy.
        token_ids: int64 sampled tokens.
        advantages: A, without gradient.
        old_log_probs: of the policy that sampled, nats; None: the current one (ratio 1).
        teacher: hidden states and head of the evidence's teacher,
        teacher_log_probs: or its log-probabilities of the tokens.
        evidence: RLSD's settings; None: advantages as they are.
        ratio_clip: (low, high); None: no clip.
        dual_clip: bound c > 1 on the loss of tokens with A' < 0: at most ``-c A'``.
        reference_log_probs: of the reference policy, for the KL.
        kl_coefficient: weight of the KL to the reference.
        kl_estimator: ``"k1"`` as ``sg(d) log_prob``, ``"k2"`` or ``"k3"`` of d = log_prob -
            reference.  The gradients of k1 and k2 are in expectation that of KL(policy||reference),
            k3's that of KL(reference||policy).
        token_weights: mask and normaliser; a token of weight 0 contributes exactly 0, and so does,
            where no metrics are asked for, one of advantage 0 without a KL: neither is computed.
        temperature: divides the policy's logits, and the teacher's unless
        teacher_temperature: is given.
        metrics: of "log_prob", "teacher_log_prob", "evidence" (delta), "evidence_weight",
            "evidence_clip_fraction", "ratio", "ratio_clip_fraction", "reference_kl", "entropy".
        reduction, gradient, tolerance, compact, backend, chunk_size, process_group, reduce_dhidden:
            as in ``divergence_loss``.

    Returns:
        Loss, token losses and metrics.

    Raises:
        ValueError: shapes, dtypes or devices disagree, the teacher is missing or given twice, or a
            divergence is passed as advantage.

    Reference:
        Shao et al., *DeepSeekMath* (GRPO), arXiv 2402.03300, eq. 3; Ye et al. (dual clip), arXiv
        1912.09729; RLSD, arXiv 2604.03128, eq. 13-15.
    """
    if isinstance(advantages, LossOutput):
        checks.fail(
            "advantages",
            "not be a divergence: summed over the vocabulary it does not depend on the sampled "
            "token, so its expected policy gradient is 0",
            "a LossOutput",
            "add its loss to the policy loss and differentiate both",
        )
    settings, inputs, metrics_of = _surrogate(
        hidden,
        advantages=advantages,
        old_log_probs=old_log_probs,
        has_teacher=teacher is not None,
        teacher_log_probs=teacher_log_probs,
        evidence=evidence,
        ratio_clip=ratio_clip,
        dual_clip=dual_clip,
        reference_log_probs=reference_log_probs,
        kl_coefficient=kl_coefficient,
        kl_estimator=kl_estimator,
    )
    tensor_checks.check_tensor("token_ids", token_ids)
    return token_loss(
        hidden,
        head,
        {"token_ids": token_ids, **inputs},
        settings,
        teacher,
        token_weights,
        temperature=temperature,
        teacher_temperature=temperature if teacher_temperature is None else teacher_temperature,
        reduction=reduction,
        metrics=metrics,
        legal_metrics=metrics_of,
        execution=execution(
            gradient, tolerance, compact, backend, chunk_size, process_group, reduce_dhidden
        ),
    )


def sampled_kl_loss(
    hidden: Tensor,  # (..., D)
    head: Tensor | LMHead,  # (V, D)
    token_ids: Tensor,  # (...)
    *,
    teacher: tuple[Tensor, Tensor | LMHead] | None = None,  # (..., D') and (V', D')
    teacher_log_probs: Tensor | None = None,  # (...)
    estimator: KlEstimator = "k1",
    importance: ImportanceCap | None = None,
    token_weights: Tensor | None = None,  # (...)
    temperature: float = 1.0,
    teacher_temperature: float | None = None,
    reduction: Reduction = "sum",
    metrics: Sequence[str] = (),
    gradient: GradientKind = "dense",
    tolerance: float | None = None,
    compact: bool = True,
    backend: str = "auto",
    chunk_size: int | None = None,
    process_group: "dist.ProcessGroup | None" = None,
    reduce_dhidden: bool = True,
) -> LossOutput:
    """A divergence estimated from the sampled token alone: TRL's default SDPO, verl's k1 to k3.

    With ``d = log P_S - log P_T`` of the token: ``"k1"`` is ``sg(d) log P_S`` (the gradient of
    KL(s||t) in expectation; d itself, differentiated, would not see the teacher and is refused),
    ``"k2"`` is ``d^2 / 2`` (the same gradient) and ``"k3"`` is ``exp(-d) + d - 1`` (that of
    KL(t||s)).

    Args:
        token_ids: int64, sampled from the student.
        teacher: hidden states and head of the teacher,
        teacher_log_probs: or its log-probabilities of the tokens, nats.
        importance: multiplies each token by its capped importance ratio.
        metrics: of "log_prob", "teacher_log_prob", "reference_kl" (k3), "entropy".
        hidden, head, token_weights, temperature, teacher_temperature, reduction, gradient,
            tolerance, compact, backend, chunk_size: as in ``policy_loss``.

    Returns:
        Loss, token losses and metrics.

    Raises:
        ValueError: as ``policy_loss``.

    Reference:
        SDPO, arXiv 2601.20802, its official code without full-logit distillation; Schulman,
        *Approximating KL Divergence*, 2020.
    """
    tensor_checks.check_tensor("hidden", hidden)
    tensor_checks.check_tensor("token_ids", token_ids)
    checks.check_evidence(True, teacher is not None, teacher_log_probs is not None)
    checks.check_kl(1.0, estimator, True)
    old = None if importance is None else importance.old_log_probs
    inputs = {
        "token_ids": token_ids,
        "advantages": hidden.new_zeros(hidden.shape[:-1], dtype=torch.float32),
        "old_log_probs": old,
        "teacher_log_probs": teacher_log_probs,
    }
    cap = None if importance is None else importance.cap
    return token_loss(
        hidden,
        head,
        {name: tensor for name, tensor in inputs.items() if tensor is not None},
        Surrogate(None, None, None, False, 1.0, estimator, cap),
        teacher,
        token_weights,
        temperature=temperature,
        teacher_temperature=temperature if teacher_temperature is None else teacher_temperature,
        reduction=reduction,
        metrics=metrics,
        legal_metrics=("log_prob", "teacher_log_prob", "reference_kl", "entropy"),
        execution=execution(
            gradient, tolerance, compact, backend, chunk_size, process_group, reduce_dhidden
        ),
    )


def _surrogate(
    hidden: Any,
    *,
    advantages: Tensor,
    old_log_probs: Tensor | None,
    has_teacher: bool,
    teacher_log_probs: Tensor | None,
    evidence: Evidence | None,
    ratio_clip: tuple[float, float] | None,
    dual_clip: float | None,
    reference_log_probs: Tensor | None,
    kl_coefficient: float,
    kl_estimator: str,
) -> tuple[Surrogate, dict[str, Tensor], tuple[str, ...]]:
    """The surrogate's settings, the tensors it reads, and the metrics that it can give."""
    tensor_checks.check_tensor("hidden", hidden)
    metrics = ["log_prob", "entropy", "ratio", "ratio_clip_fraction"]
    inputs: dict[str, Tensor | None] = {"advantages": advantages, "old_log_probs": old_log_probs}
    checks.check_evidence(evidence is not None, has_teacher, teacher_log_probs is not None)
    if evidence is not None:
        dtype = accumulation_dtype(hidden.dtype)
        tokens = hidden.shape[:-1]
        if isinstance(evidence.mix, Tensor):
            tensor_checks.check_leading("evidence.mix", evidence.mix, tokens, "hidden")
            inputs["mix"] = evidence.mix.to(dtype)
        else:
            inputs["mix"] = hidden.new_full(tokens, evidence.mix, dtype=dtype)
        metrics += ["evidence", "evidence_weight", "evidence_clip_fraction", "teacher_log_prob"]
        inputs["teacher_log_probs"] = teacher_log_probs
        if evidence.log_prob == "old" and old_log_probs is None:
            checks.fail(
                "evidence.log_prob",
                'be "current" without old_log_probs',
                "'old'",
                "pass old_log_probs, or Evidence(log_prob='current')",
            )
    if ratio_clip is not None:
        checks.check_ratio_clip(ratio_clip)
    if dual_clip is not None and not dual_clip > 1:
        checks.fail("dual_clip", "be above 1", dual_clip, "verl and RLSD use 3.0; None is no clip")
    checks.check_kl(kl_coefficient, kl_estimator, reference_log_probs is not None)
    if kl_coefficient:
        inputs["reference_log_probs"] = reference_log_probs
        metrics.append("reference_kl")
    settings = Surrogate(
        ratio_clip,
        dual_clip,
        None if evidence is None else evidence.clip,
        evidence is not None and evidence.log_prob == "old",
        float(kl_coefficient),
        kl_estimator,
        None,
    )
    return settings, {k: v for k, v in inputs.items() if v is not None}, tuple(metrics)
