"""A row function over the logits of all tokens, differentiably: the way to the one operator.

Dimension key:  N tokens, D hidden size, V vocabulary, J values of a row function for each token
"""

from typing import NamedTuple

import torch
from torch import Tensor

from fused_sd import checks
from fused_sd.engine.backward import backward, keep
from fused_sd.engine.certificate import GradientCertificate
from fused_sd.engine.chunk import Objective
from fused_sd.engine.operator import Options, chunked_run, structured
from fused_sd.engine.options import Execution
from fused_sd.head.projection import LMHead, accumulation_dtype
from fused_sd.head.vocab_shard import Shards
from fused_sd.settings import encode

chunked_run.register_autograd(backward, setup_context=keep)


class ChunkedResult(NamedTuple):
    """What the walk returns, with the tokens flattened to N."""

    total: Tensor  # (), sum(row_weights * values); differentiable when the loss is reduced inside
    values: Tensor  # (N, J); differentiable when it is not
    extras: list[Tensor]  # (N, ...), detached; 0 for a token without a weight
    certificate: GradientCertificate | None  # of a gradient that may be sparse


def walk(
    rows: Objective,
    student: tuple[Tensor, LMHead],
    teacher: tuple[Tensor, LMHead] | None,
    inputs: list[Tensor],  # each (..., rest)
    token_weights: Tensor | None,  # (...)
    *,
    temperature: float,
    teacher_temperature: float = 1.0,
    reduced: bool,
    execution: Execution,
) -> ChunkedResult:
    """Apply a row function to the logits of all tokens, differentiably.

    Args:
        rows: the row function.
        student: hidden states (..., D) and head, differentiated.
        teacher: hidden states (..., D') and head, constants.
        inputs: what the row function needs for each token.
        token_weights: the weight of each token's value; a token of weight 0 is left out.
        temperature: divides the student's logits.
        teacher_temperature: divides the teacher's logits.
        reduced: whether ``total`` is differentiable, or ``values`` are.
        execution: how the walk runs.
    """
    shards = _shards(student[1], None if teacher is None else teacher[1], execution)
    rank = 0 if shards is None else shards.rank
    hidden, weight, bias = student[1].operands(student[0], rank)
    t_hidden = t_weight = t_bias = t_shaping = None
    if teacher is not None:
        t_hidden, t_weight, t_bias = teacher[1].operands(teacher[0], rank)
        t_shaping = teacher[1].shaping(teacher_temperature)
        t_hidden, t_weight = t_hidden.detach(), t_weight.detach()
        t_bias = None if t_bias is None else t_bias.detach()
    wanted = [
        tensor is not None and tensor.requires_grad and torch.is_grad_enabled()
        for tensor in (hidden, weight, bias)
    ]
    options = Options(
        student[1].shaping(temperature),
        t_shaping,
        reduced,
        execution.compact,
        execution.backend,
        execution.chunk_size,
        execution.tolerance,
        shards,
    )
    wide = accumulation_dtype(hidden.dtype)
    row_weights = None
    if token_weights is not None:
        weights = token_weights.detach().to(wide).reshape(-1)
        row_weights = (weights if reduced else (weights != 0).to(wide))[:, None]
    flat = torch.ops.fused_sd.chunked_run(
        hidden,
        weight,
        bias,
        t_hidden,
        t_weight,
        t_bias,
        row_weights,
        [_flat(tensor, student[0].shape[:-1]) for tensor in inputs],
        *encode((rows, options)),
        wanted,
    )
    total, values, _, sparse, extras = structured(flat)
    extras = [extra.detach() for extra in extras]
    certificate = None
    if execution.tolerance is not None and any(wanted):
        is_dense = torch.zeros_like(sparse.kept, dtype=torch.bool)
        is_dense = is_dense.index_fill(0, sparse.dense_tokens, True) & (sparse.norm != 0)
        certificate = GradientCertificate(sparse.kept, is_dense, sparse.dropped, sparse.norm)
        certificate = GradientCertificate(*(tensor.detach() for tensor in certificate))
    if reduced:
        return ChunkedResult(total, values.detach(), extras, certificate)
    return ChunkedResult(total.detach(), values, extras, certificate)


def _shards(student: LMHead, teacher: LMHead | None, execution: Execution) -> Shards | None:
    """How both sides' vocabulary lies on the ranks, at the same borders."""
    group, sizes = execution.process_group, student.shard_sizes
    if group is None or sizes is None or group.size() == 1:
        return None
    counts = student.token_counts()
    if teacher is not None:
        assert teacher.shard_sizes is not None
        if tuple(teacher.shard_sizes[:-1]) != tuple(sizes[:-1]):
            checks.fail(
                "teacher_head",
                f"be cut between the ranks where the student's head is, into {sizes} rows",
                teacher.shard_sizes,
                "shard the teacher's head at the student's borders; the last rank may have more",
            )
        counts = [max(pair) for pair in zip(counts, teacher.token_counts(), strict=True)]
    return Shards(group.group_name, group.rank(), tuple(counts), execution.reduce_dhidden)


def _flat(tensor: Tensor, shape: torch.Size) -> Tensor:
    """(..., rest) as (N, rest), integers as int64."""
    flat = tensor.detach().reshape(shape.numel(), *tensor.shape[len(shape) :])
    return flat if flat.is_floating_point() else flat.long()
