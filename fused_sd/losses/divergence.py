"""Divergence of a student from a teacher, from hidden states: what all divergence losses call.

``sdpo_loss`` and its kin (one file each in this folder) choose a divergence, a support and weights,
and call ``divergence_loss``; ``topk_divergence_loss`` is for a teacher server's entries.  Here the
tensors are checked, the settings become one ``Comparison`` and one ``Options``, and a
``DivergenceObjective`` is applied to the chunks (``engine/apply.py``), together with a
``LogProbObjective`` where values with a gradient of their own are wanted (``JointObjective``).

Dimension key:  (...) tokens, D and D' hidden sizes, V and V' vocabularies, K entries of a support
"""

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor
from typing_extensions import Unpack

from fused_sd import checks
from fused_sd.checks import tensors as tensor_checks
from fused_sd.engine.apply import States, apply_objective
from fused_sd.engine.chunk import Objective
from fused_sd.engine.options import LossOptions, Options
from fused_sd.head.lm_head import Head, placed_head
from fused_sd.losses.output import LossOutput, reduce_loss
from fused_sd.losses.sides import check_teacher_states
from fused_sd.objectives.divergence import DivergenceObjective
from fused_sd.objectives.joint import JointObjective
from fused_sd.objectives.token import LogProbObjective
from fused_sd.terms.comparison import Comparison, TokenClip
from fused_sd.terms.divergence import Divergence
from fused_sd.terms.metrics import METRIC_NEEDS, check_metric_needs, current_names
from fused_sd.terms.support import FULL_VOCABULARY, Remainder, Support, TokenIds
from fused_sd.terms.weighting import ImportanceCap

WITH_GRAD = ("student_log_prob", "student_entropy")  # in the order of their values


class DivergenceOptions(LossOptions, total=False):
    """``LossOptions``, and what belongs to the sampled tokens; see ``divergence_loss``."""

    token_ids: Tensor | None
    importance: ImportanceCap | None


class Sampled(NamedTuple):
    """What belongs to the sampled tokens, and which of their values are wanted with a gradient."""

    token_ids: Tensor | None  # (...)
    importance: ImportanceCap | None
    with_grad: Sequence[str]


def divergence_loss(
    student_hidden: Tensor,  # (..., D)
    student_head: Head,  # (V, D)
    teacher_hidden: Tensor,  # (..., D')
    teacher_head: Head,  # (V', D')
    *,
    divergence: Divergence = "reverse_kl",
    support: Support = FULL_VOCABULARY,
    remainder: Remainder = "tail",
    tail_floor: float | None = None,
    entry_clip: float | None = None,
    token_clip: TokenClip = None,
    token_ids: Tensor | None = None,  # (...)
    importance: ImportanceCap | None = None,
    with_grad: Sequence[str] = (),
    **options: Unpack[LossOptions],
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
        divergence: ``"forward_kl"`` KL(t||s), ``"reverse_kl"`` KL(s||t), ``Jsd(beta)``,
            ``MixedKl(forward_weight)`` or ``SkewKl(student_weight)``.
        support: the entries that are compared: ``FULL_VOCABULARY``, ``StudentTopK(k)``,
            ``TeacherTopK(k)``, ``UnionTopK(k)``, ``TeacherNucleus(k, mass)`` or ``TokenIds(ids)``.
        remainder: what the other entries of a truncated support become: ``"tail"``, one bucket on
            each side; ``"renormalize"``, nothing, with both sides normalised over the support;
            ``"drop"``, nothing, without normalising; ``"teacher_renormalize"``, the cross entropy
            of the renormalised teacher against the student's whole softmax.
        tail_floor: SDPO's official code keeps the mass on the support below ``exp(-1e-7)``, which
            stops the tail's gradient there; pass 1e-7 for its arithmetic.  None: the exact tail.
        entry_clip: upper bound of each vocabulary entry's term, before the sum (OPSD); the loss may
            then be negative.
        token_clip: upper bound, or (lower, upper), of each token's loss, after the sum.
        token_ids: int64 sampled tokens, for ``importance`` and the log-prob metrics.
        importance: multiplies each token by its capped importance ratio (SDPO).
        with_grad: what the same run returns beside the divergence, differentiable, for a policy
            loss: ``"student_log_prob"`` of token_ids, ``"student_entropy"``.  Needs
            ``reduction="none"``.
        **options: token_weights, temperature, teacher_temperature, reduction, metrics, gradient,
            tolerance, compact, backend, chunk_size, process_group, reduce_dhidden: see
            ``fused_sd.Options``.  Metrics are names from ``fused_sd.METRICS``.

    Returns:
        Loss, token losses, metrics, and the certificate of a gradient that may be sparse.

    Raises:
        ValueError: shapes, dtypes or devices disagree, a number is out of range, the teacher
            requires a gradient, or settings do not go together; the message says what to do.

    Examples:
        >>> import torch, fused_sd
        >>> _ = torch.manual_seed(0)
        >>> (student, teacher), head = torch.randn(2, 5, 16), torch.randn(100, 16)
        >>> output = fused_sd.divergence_loss(student, head, teacher, head, reduction="mean")
        >>> log_s, log_t = ((hidden @ head.T).log_softmax(-1) for hidden in (student, teacher))
        >>> eager = (log_s.exp() * (log_s - log_t)).sum(-1).mean()
        >>> torch.allclose(output.loss, eager, rtol=1e-4)
        True
    """
    chosen = Options.of("divergence_loss", options)
    student = placed_head(student_head, "student_head", chosen.process_group)
    teacher = placed_head(teacher_head, "teacher_head", chosen.process_group)
    tensor_checks.check_hidden(student_hidden, "student_hidden", student.weight, "student_head")
    given = student_hidden, student, "student_hidden"
    check_teacher_states(teacher_hidden, teacher, *given)
    clips = tail_floor, None, entry_clip, token_clip
    comparison = Comparison(divergence, support, remainder, *clips)
    comparison.check_vocabularies(student.num_tokens, teacher.num_tokens)
    inputs: dict[str, Tensor] = {}
    if isinstance(support, TokenIds):
        shape = student_hidden.shape[:-1]
        vocab = comparison.num_given(student.num_tokens, teacher.num_tokens)
        given_ids = "ids", support.ids, shape, student_hidden.device, vocab
        tensor_checks.check_entry_ids(*given_ids, "student_hidden")
        inputs["entry_ids"] = support.ids
    sides = (student_hidden, student), (teacher_hidden, teacher)
    return _compare(*sides, inputs, comparison, Sampled(token_ids, importance, with_grad), chosen)


def topk_divergence_loss(
    student_hidden: Tensor,  # (..., D)
    student_head: Head,  # (V, D)
    teacher_token_ids: Tensor,  # (..., K)
    teacher_log_probs: Tensor,  # (..., K)
    *,
    divergence: Divergence = "forward_kl",
    remainder: Remainder = "tail",
    tail_floor: float | None = None,
    log_prob_floor: float | None = None,
    entry_clip: float | None = None,
    token_clip: TokenClip = None,
    token_ids: Tensor | None = None,  # (...)
    importance: ImportanceCap | None = None,
    with_grad: Sequence[str] = (),
    **options: Unpack[LossOptions],
) -> LossOutput:
    """Divergence from a teacher of which only the log-probabilities of K entries are known.

    A teacher server returns its top-k ids and their log-probabilities, at the temperature it used.
    The settings are those of ``divergence_loss`` with the given entries as support; a tail bucket
    holds what the K log-probabilities leave of 1.  A server rounds, so the probabilities of a sure
    teacher may sum to 1 or more.  Their sum is known to ``eps(fp32) + eps(sent) sum(p |log p|)``,
    with eps of the dtype that was sent, and a tail below that is taken to be that large: the loss
    stays finite, and a tail that the numbers can tell is exact.  ``tail_floor`` is a floor of your
    own, on both sides.

    Args:
        student_hidden, student_head: as in ``divergence_loss``.
        teacher_token_ids: (..., K) int64; a repeated id counts once, a negative one not at all.
        teacher_log_probs: (..., K) nats, at most 0, in any floating dtype; -inf marks padding.  NaN
            and numbers above 0 are refused on the CPU; on a GPU, whose values are not read, they
            make the token's loss NaN.  A token without entries has loss 0.
        divergence, remainder, tail_floor, entry_clip, token_clip, token_ids, importance, with_grad:
            as in ``divergence_loss``.
        log_prob_floor: lower bound of both sides' log-probabilities, with ``remainder="drop"``
            (verl's ``log_prob_min_clamp``); an entry of the student below it has no gradient.
        **options: as in ``divergence_loss``, without teacher_temperature; temperature divides the
            student's logits.

    Returns:
        Loss, token losses and metrics.

    Raises:
        ValueError: as ``divergence_loss``.

    Examples:
        >>> import torch, fused_sd
        >>> _ = torch.manual_seed(0)
        >>> (student, teacher), head = torch.randn(2, 5, 16), torch.randn(100, 16)
        >>> ids, log_probs, _ = fused_sd.entry_log_probs(teacher, head, 8)  # or a server's answer
        >>> known = fused_sd.topk_divergence_loss(student, head, ids, log_probs, reduction="mean")
        >>> whole = fused_sd.gkd_loss(student, head, teacher, head, beta=0)  # over all entries
        >>> 0 < known.loss.item() < whole.loss.item()  # the rest is one bucket
        True
    """
    chosen = Options.of("topk_divergence_loss", options)
    student = placed_head(student_head, "student_head", chosen.process_group)
    tensor_checks.check_hidden(student_hidden, "student_hidden", student.weight, "student_head")
    shape, device = student_hidden.shape[:-1], student_hidden.device
    given = "teacher_token_ids", teacher_token_ids, shape, device
    tensor_checks.check_entry_ids(*given, student.num_tokens, "student_hidden")
    clips = tail_floor, log_prob_floor, entry_clip, token_clip
    comparison = Comparison(divergence, TokenIds(teacher_token_ids), remainder, *clips)
    inputs = {"entry_ids": teacher_token_ids, "teacher_log_probs": teacher_log_probs}
    sampled = Sampled(token_ids, importance, with_grad)
    return _compare((student_hidden, student), None, inputs, comparison, sampled, chosen)


def _compare(
    student: States,
    teacher: States | None,
    inputs: dict[str, Tensor],
    comparison: Comparison,
    sampled: Sampled,
    options: Options,
) -> LossOutput:
    """Check what both kinds of teacher have in common, and apply the objective."""
    shape, device = student[0].shape[:-1], student[0].device
    owner = shape, device, "student_hidden"
    tensor_checks.check_token_weights(options.token_weights, *owner, options.reduction)
    if "teacher_log_probs" in inputs:
        served = inputs["entry_ids"], inputs["teacher_log_probs"]
        tensor_checks.check_teacher_entries(*served, options.token_weights)
    metrics = current_names("metrics", options.metrics, METRIC_NEEDS)
    given = {
        "teacher states": teacher is not None,
        "truncated support": comparison.support.is_truncated,
        "top-k support": comparison.support.top_k > 0,
        "token_ids": sampled.token_ids is not None,
        "entry_clip": comparison.entry_clip is not None,
        "token_clip": comparison.token_clip is not None,
        "importance": sampled.importance is not None,
    }
    check_metric_needs(metrics.values(), given)
    if sampled.token_ids is not None:
        vocab = student[1].num_tokens
        if teacher is not None:
            vocab = max(vocab, teacher[1].num_tokens)
        ids = "token_ids", sampled.token_ids, shape, device
        tensor_checks.check_ids(*ids, vocab, options.token_weights, "student_hidden")
        inputs["token_ids"] = sampled.token_ids
    if sampled.importance is not None:
        checks.check_instance("importance", sampled.importance, ImportanceCap)
        if sampled.token_ids is None:
            checks.fail("importance", "come with token_ids", "none", "pass the sampled tokens")
        old = sampled.importance.old_log_probs
        tensor_checks.check_per_token("old_log_probs", old, *owner)
        tensor_checks.check_token_values("old_log_probs", old, options.token_weights)
        inputs["old_log_probs"] = old
    objective = DivergenceObjective(
        comparison.without_tensors(),
        None if sampled.importance is None else sampled.importance.cap,
        tuple(inputs),
        tuple(metrics.values()),
    )
    names = current_names("with_grad", sampled.with_grad, WITH_GRAD)
    joint, more = _with_log_probs(objective, tuple(names.values()), sampled.token_ids, options)
    applied = apply_objective(
        joint, student, teacher, [*inputs.values(), *more], options.token_weights, options
    )
    token_loss, *observed = applied.extras
    extras = dict(zip(metrics, observed, strict=True))
    output = reduce_loss(applied, token_loss, extras, shape, options)
    if not names:
        return output
    columns = dict(zip(WITH_GRAD, applied.values.unbind(1)[1:], strict=False))
    chosen = {name: columns[current].reshape(shape) for name, current in names.items()}
    return output._replace(with_grad=chosen)


def _with_log_probs(
    objective: DivergenceObjective,
    names: tuple[str, ...],
    token_ids: Tensor | None,
    options: Options,
) -> tuple[Objective, list[Tensor]]:
    """The objective with the values that are wanted with a gradient, and their inputs."""
    if not names:
        return objective, []
    if token_ids is None:
        checks.fail("with_grad", "come with token_ids", "none", "pass the sampled tokens")
    if options.is_reduced or options.gradient != "dense":
        checks.fail(
            "with_grad",
            'come with reduction="none" and gradient="dense"',
            f"reduction={options.reduction!r}, gradient={options.gradient!r}",
            "its values have gradients of their own: reduce the divergences after the call",
        )
    assert token_ids is not None
    has_entropy = "student_entropy" in names
    log_probs = LogProbObjective(k=1, is_top_k=False, tail=False, entropy=has_entropy)
    joint = JointObjective(objective, log_probs, len(objective.input_names))
    return joint, [token_ids[..., None]]
