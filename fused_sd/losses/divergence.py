"""Divergence of a student from a teacher, from hidden states: the one mechanism behind the named
losses.

Dimension key:  (...) tokens, D and D' hidden sizes, V and V' vocabularies, K entries of a support
"""

from collections.abc import Sequence

import torch.distributed as dist
from torch import Tensor

from fused_sd import checks
from fused_sd.checks import tensors as tensor_checks
from fused_sd.engine.certificate import GradientKind
from fused_sd.engine.options import execution
from fused_sd.head.projection import LMHead, placed_head
from fused_sd.losses.compare import compare
from fused_sd.losses.divergence_checks import TokenClip, check_reach, check_sides, support_kind
from fused_sd.losses.output import LossOutput, Reduction
from fused_sd.terms.divergence import Divergence, divergence_term
from fused_sd.terms.support import FULL_VOCABULARY, FullVocabulary, Remainder, Support, TokenIds
from fused_sd.terms.weighting import ImportanceCap


def divergence_loss(
    student_hidden: Tensor,  # (..., D)
    student_head: Tensor | LMHead,  # (V, D)
    teacher_hidden: Tensor,  # (..., D')
    teacher_head: Tensor | LMHead,  # (V', D')
    *,
    divergence: Divergence = "reverse_kl",
    support: Support = FULL_VOCABULARY,
    remainder: Remainder = "tail",
    tail_floor: float | None = None,
    entry_clip: float | None = None,
    token_clip: TokenClip = None,
    token_weights: Tensor | None = None,  # (...)
    token_ids: Tensor | None = None,  # (...)
    importance: ImportanceCap | None = None,
    temperature: float = 1.0,
    teacher_temperature: float | None = None,
    reduction: Reduction = "sum",
    metrics: Sequence[str] = (),
    with_grad: Sequence[str] = (),
    gradient: GradientKind = "dense",
    tolerance: float | None = None,
    compact: bool = True,
    backend: str = "auto",
    chunk_size: int | None = None,
    process_group: "dist.ProcessGroup | None" = None,
    reduce_dhidden: bool = True,
) -> LossOutput:
    """Divergence between the next-token distributions of a student and a teacher.

    ``sum_n w_n ratio_n clip(sum_{v in S_n} term(log_s[n, v], log_t[n, v]))`` with
    ``log_s = log_softmax(student_hidden @ student_head.T / temperature)`` and ``log_t`` likewise.
    No (tokens, vocabulary) tensor is made; logits are fp32 (float64 for float64 operands).

    Args:
        student_hidden: states that enter the student's lm_head; fp32, fp64, bf16 or fp16.
        student_head: its weight, or an ``LMHead`` with bias, scale, soft-cap or padding.
        teacher_hidden: the teacher's states at the same tokens, without gradient.
        teacher_head: as student_head; may be the student's own, which then counts as constant here.
        divergence: ``"forward_kl"`` KL(t||s), ``"reverse_kl"`` KL(s||t), ``Jsd(beta)`` or
            ``MixedKl(forward_weight)``.
        support: the entries compared: ``FULL_VOCABULARY``, ``StudentTopK(k)``, ``TeacherTopK(k)``,
            ``UnionTopK(k)`` or ``TokenIds(ids)``.
        remainder: of a truncated support: ``"tail"`` one bucket on each side, ``"renormalize"``
            both sides over the support, ``"drop"``, or ``"teacher_renormalize"`` (cross entropy of
            the renormalised teacher against the student's whole softmax).
        tail_floor: SDPO's official code keeps the mass on the support below ``exp(-1e-7)``, which
            stops the tail's gradient there; pass 1e-7 for its arithmetic.  None: the exact tail.
        entry_clip: upper bound of each vocabulary entry's term, before the sum (OPSD); the loss may
            then be negative.
        token_clip: upper bound, or (lower, upper), of each token's loss, after the sum.
        token_weights: mask, normaliser and advantage in one; a token of weight 0 contributes
            exactly 0 and costs nothing, whatever its states hold.  None: ones.
        token_ids: sampled tokens, for ``importance`` and the log-prob metrics.
        importance: multiplies each token by its capped importance ratio (SDPO).
        temperature: divides the logits of both sides; there is no temperature-squared factor.
        teacher_temperature: divides the teacher's logits instead, where given.
        reduction: ``"sum"``; ``"mean"``, the sum divided by the sum of the weights; ``"none"``.
        metrics: names from ``fused_sd.METRICS``, returned per token.
        with_grad: what the same walk returns beside the divergence, differentiable, for a policy
            loss: ``"log_prob"`` of token_ids, ``"entropy"``.  With ``reduction="none"``.
        gradient: ``"dense"``, or ``"sparse"``: of each row of the logits' gradient the largest
            entries are kept, the rest is put on the head's mean row, and rows that are not nearly
            sparse take the dense way.  It saves two of four GEMMs where most tokens are nearly
            decided.  A renormalised support needs neither: its gradient has K entries.
        tolerance: share of the gradient's L1 norm that a sparse gradient may drop, over the batch;
            with ``reduction="none"`` of each token.  None: 2**-8.
        compact: drop tokens of weight 0 before any GEMM.  Their number is read from the device
            once; False computes and discards them instead.
        backend: ``"auto"``: Triton on a GPU, PyTorch elsewhere; or one of them by name.
        chunk_size: tokens whose logits are held at a time; changes memory and time, not the result.
        process_group: ranks on which the vocabulary lies (tensor parallelism).  Each passes its own
            rows of both heads, and the same of everything else; ids count over all ranks.  Every
            rank returns the same loss, and the gradient of its own rows.  Ranks ask each other once
            for each weight whether they have as many rows, and wait for the answer, unless
            ``LMHead(weight, shard_sizes=...)`` says it.
        reduce_dhidden: with ``process_group``, add the ranks' parts of the hidden states' gradient;
            False where the framework does (Megatron's sequence parallelism, an all-reduce behind
            the loss).

    Returns:
        Loss, token losses, metrics, and with a sparse gradient its certificate.

    Raises:
        ValueError: shapes, dtypes or devices disagree, a number is out of range, the teacher
            requires a gradient, or settings do not go together; the message says what to do.
    """
    student = placed_head(student_head, process_group)
    teacher = placed_head(teacher_head, process_group)
    shape = check_sides(student_hidden, student, teacher_hidden, teacher)
    kind = support_kind(support)
    term = divergence_term(divergence)
    check_reach(student.num_tokens, teacher.num_tokens, term.name, kind)
    inputs: dict[str, Tensor] = {}
    k = 0
    if isinstance(support, TokenIds):
        vocab = max(student.num_tokens, teacher.num_tokens)
        tensor_checks.check_entry_ids(support.ids, shape, student_hidden.device, vocab)
        inputs["entry_ids"] = support.ids
        k = support.ids.shape[-1]
    elif not isinstance(support, FullVocabulary):
        k = int(support.k)
        vocab = min(student.num_tokens, teacher.num_tokens)
        checks.check_support_size(type(support).__name__, k, vocab)
    if teacher_temperature is None:
        teacher_temperature = temperature
    return compare(
        (student_hidden, student),
        (teacher_hidden, teacher),
        inputs,
        shape,
        kind=kind,
        k=k,
        divergence=divergence,
        remainder=remainder,
        tail_floor=tail_floor,
        log_prob_floor=None,
        entry_clip=entry_clip,
        token_clip=token_clip,
        token_weights=token_weights,
        token_ids=token_ids,
        importance=importance,
        temperature=temperature,
        teacher_temperature=teacher_temperature,
        reduction=reduction,
        metrics=metrics,
        with_grad=with_grad,
        execution=execution(
            gradient, tolerance, compact, backend, chunk_size, process_group, reduce_dhidden
        ),
    )


def topk_divergence_loss(
    student_hidden: Tensor,  # (..., D)
    student_head: Tensor | LMHead,  # (V, D)
    teacher_token_ids: Tensor,  # (..., K)
    teacher_log_probs: Tensor,  # (..., K)
    *,
    divergence: Divergence = "forward_kl",
    remainder: Remainder = "tail",
    tail_floor: float | None = None,
    log_prob_floor: float | None = None,
    entry_clip: float | None = None,
    token_clip: TokenClip = None,
    token_weights: Tensor | None = None,  # (...)
    token_ids: Tensor | None = None,  # (...)
    importance: ImportanceCap | None = None,
    temperature: float = 1.0,
    reduction: Reduction = "sum",
    metrics: Sequence[str] = (),
    with_grad: Sequence[str] = (),
    gradient: GradientKind = "dense",
    tolerance: float | None = None,
    compact: bool = True,
    backend: str = "auto",
    chunk_size: int | None = None,
    process_group: "dist.ProcessGroup | None" = None,
    reduce_dhidden: bool = True,
) -> LossOutput:
    """Divergence from a teacher that is known by its log-probabilities of K entries only.

    What a teacher server returns: its top-k ids and their log-probabilities, at the temperature it
    used.  The settings are those of ``divergence_loss`` with the given entries as support; a tail
    bucket holds what the K log-probabilities leave of 1.

    Args:
        student_hidden, student_head: as in ``divergence_loss``.
        teacher_token_ids: (..., K) int64; a repeated id counts once, a negative one not at all.
        teacher_log_probs: (..., K) nats, at most 0; -inf marks padding.
        log_prob_floor: lower bound of both sides' log-probabilities, with ``remainder="drop"``
            (verl's ``log_prob_min_clamp``); an entry of the student below it has no gradient.
        temperature: divides the student's logits.

    Returns:
        Loss, token losses and metrics.

    Raises:
        ValueError: as ``divergence_loss``.
    """
    student = placed_head(student_head, process_group)
    tensor_checks.check_hidden(student_hidden, "student_hidden", student.weight, "student_head")
    shape = student_hidden.shape[:-1]
    tensor_checks.check_entry_ids(
        teacher_token_ids, shape, student_hidden.device, student.num_tokens
    )
    tensor_checks.check_teacher_entries(teacher_token_ids, teacher_log_probs)
    return compare(
        (student_hidden, student),
        None,
        {"entry_ids": teacher_token_ids, "teacher_log_probs": teacher_log_probs},
        shape,
        kind="entries",
        k=teacher_token_ids.shape[-1],
        divergence=divergence,
        remainder=remainder,
        tail_floor=tail_floor,
        log_prob_floor=log_prob_floor,
        entry_clip=entry_clip,
        token_clip=token_clip,
        token_weights=token_weights,
        token_ids=token_ids,
        importance=importance,
        temperature=temperature,
        teacher_temperature=1.0,
        reduction=reduction,
        metrics=metrics,
        with_grad=with_grad,
        execution=execution(
            gradient, tolerance, compact, backend, chunk_size, process_group, reduce_dhidden
        ),
    )
