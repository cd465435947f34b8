"""What both kinds of teacher have in common: settings that are checked, and a walk.

Dimension key:  (...) tokens
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from fused_sd import checks
from fused_sd.checks import tensors as tensor_checks
from fused_sd.engine.apply import walk
from fused_sd.engine.chunk import Objective
from fused_sd.engine.options import Execution
from fused_sd.head.projection import LMHead
from fused_sd.losses.divergence_checks import TokenClip, token_bounds
from fused_sd.losses.output import LossOutput, Reduction, reduce_loss
from fused_sd.objectives.divergence import DivergenceObjective
from fused_sd.objectives.joint import JointObjective
from fused_sd.objectives.token import LogProbObjective
from fused_sd.terms.combinations import METRIC_NEEDS, check_combination, check_metric_needs
from fused_sd.terms.divergence import Divergence, divergence_term
from fused_sd.terms.weighting import ImportanceCap

WITH_GRAD = ("log_prob", "entropy")  # in the order of their values


def compare(
    student: tuple[Tensor, LMHead],
    teacher: tuple[Tensor, LMHead] | None,
    inputs: dict[str, Tensor],
    shape: torch.Size,
    *,
    kind: str,
    k: int,
    divergence: Divergence,
    remainder: str,
    tail_floor: float | None,
    log_prob_floor: float | None,
    entry_clip: float | None,
    token_clip: TokenClip,
    token_weights: Tensor | None,
    token_ids: Tensor | None,
    importance: ImportanceCap | None,
    temperature: float,
    teacher_temperature: float,
    reduction: Reduction,
    metrics: Sequence[str],
    with_grad: Sequence[str],
    execution: Execution,
) -> LossOutput:
    """Check what both kinds of teacher have in common, and walk."""
    term, device = divergence_term(divergence), student[0].device
    check_combination(
        term.name,
        kind,
        remainder,
        entry_clip=entry_clip is not None,
        tail_floor=tail_floor is not None,
        log_prob_floor=log_prob_floor is not None,
    )
    if entry_clip is not None:
        checks.check_positive("entry_clip", entry_clip, "pass None for no clip")
    if tail_floor is not None:
        checks.check_positive("tail_floor", tail_floor, "pass None for the exact tail")
    if log_prob_floor is not None:
        checks.check_finite("log_prob_floor", log_prob_floor, "pass None for no floor")
    bounds = token_bounds(token_clip)
    checks.check_run(reduction, temperature)
    checks.check_positive("teacher_temperature", teacher_temperature)
    tensor_checks.check_per_token("token_weights", token_weights, shape, device, "student_hidden")
    checks.check_metrics(metrics, METRIC_NEEDS)
    given = {
        "teacher states": teacher is not None,
        "truncated support": kind != "full",
        "top-k support": kind in ("student", "teacher", "union"),
        "token_ids": token_ids is not None,
        "entry_clip": entry_clip is not None,
        "token_clip": token_clip is not None,
        "importance": importance is not None,
    }
    check_metric_needs(tuple(metrics), given)
    if token_ids is not None:
        vocab = student[1].num_tokens
        tensor_checks.check_ids(
            "token_ids", token_ids, shape, device, vocab, token_weights, "student_hidden"
        )
        inputs["token_ids"] = token_ids
    if importance is not None:
        if token_ids is None:
            checks.fail("importance", "come with token_ids", "none", "pass the sampled tokens")
        old = importance.old_log_probs
        tensor_checks.check_per_token("old_log_probs", old, shape, device, "student_hidden")
        inputs["old_log_probs"] = old
    rows = DivergenceObjective(
        term,
        "ids" if kind == "entries" else kind,
        k,
        remainder,
        tail_floor,
        log_prob_floor,
        entry_clip,
        bounds,
        None if importance is None else importance.cap,
        tuple(inputs),
        tuple(metrics),
    )
    joint, more = _joint(rows, with_grad, token_ids, reduction, execution)
    walked = walk(
        joint,
        student,
        teacher,
        [*inputs.values(), *more],
        token_weights,
        temperature=temperature,
        teacher_temperature=teacher_temperature,
        reduced=reduction != "none",
        execution=execution,
    )
    token_loss, *observed = walked.extras
    extras = dict(zip(metrics, observed, strict=True))
    output = reduce_loss(walked, token_loss, extras, token_weights, reduction, shape)
    if not with_grad:
        return output
    columns = zip(WITH_GRAD, walked.values.unbind(1)[1:])
    beside = {name: values.reshape(shape) for name, values in columns if name in with_grad}
    return output._replace(with_grad=beside)


def _joint(
    rows: DivergenceObjective,
    with_grad: Sequence[str],
    token_ids: Tensor | None,
    reduction: str,
    execution: Execution,
) -> tuple[Objective, list[Tensor]]:
    """The row function of a divergence and of what is wanted beside it, and its inputs."""
    if not with_grad:
        return rows, []
    for name in with_grad:
        checks.check_one_of("with_grad", name, WITH_GRAD)
    if token_ids is None:
        checks.fail("with_grad", "come with token_ids", "none", "pass the sampled tokens")
    if reduction != "none" or execution.tolerance is not None:
        checks.fail(
            "with_grad",
            'come with reduction="none" and gradient="dense"',
            f"reduction={reduction!r}"
            + ("" if execution.tolerance is None else ' and gradient="sparse"'),
            "its values have gradients of their own: reduce the divergences after the call",
        )
    assert token_ids is not None
    scored = LogProbObjective(1, False, False, "entropy" in with_grad)
    return JointObjective(rows, scored, len(rows.input_names)), [token_ids[..., None]]
