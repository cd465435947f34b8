"""From a loss to the chunk loop: flatten the tokens, call the one operator, name what it returns.

A public loss in ``losses/`` checks its tensors, chooses an objective (what is done with a chunk of
logits) and calls ``apply_objective``.  This module brings both sides into the shape that the
operator takes: hidden states (N, D), the head's rows of this rank, per-token inputs (N, ...), and
all settings as text and numbers, because an operator's schema knows nothing else.  The operator
``fused_sd::chunked_run`` (``engine/operator.py``) loops over chunks of tokens; its derivative is
``engine/backward.py``.  Both are opaque to ``torch.compile``, which traces up to here.

Dimension key:  N tokens, D hidden size, V vocabulary, J values of an objective for each token
"""

from typing import NamedTuple

import torch
from torch import Tensor

from fused_sd import checks
from fused_sd.checks import tensors as tensor_checks
from fused_sd.engine.backward import backward, save_for_backward
from fused_sd.engine.certificate import GradientCertificate
from fused_sd.engine.chunk import Objective
from fused_sd.engine.operator import RunSettings, chunked_run, structured
from fused_sd.engine.options import Options
from fused_sd.head.lm_head import LMHead
from fused_sd.head.projection import accumulation_dtype
from fused_sd.head.vocab_shard import Shards
from fused_sd.settings import encode

chunked_run.register_autograd(backward, setup_context=save_for_backward)

States = tuple[Tensor, LMHead]  # hidden states (..., D) and the head that they enter


class Applied(NamedTuple):
    """What an objective returned for all tokens, flattened to N."""

    total: Tensor  # (), sum(row_weights * values); differentiable where the loss is reduced
    values: Tensor  # (N, J); differentiable where the loss is not reduced
    extras: list[Tensor]  # (N, ...), detached; 0 for a token without a weight
    certificate: GradientCertificate | None  # of a gradient that may be sparse


def apply_objective(
    objective: Objective,
    student: States,
    teacher: States | None,
    inputs: list[Tensor],  # each (..., rest)
    token_weights: Tensor | None,  # (...)
    options: Options,
) -> Applied:
    """Apply an objective to the logits of all tokens, differentiably.

    Args:
        objective: what is done with a chunk of logits.
        student: hidden states and head, differentiated.
        teacher: hidden states and head, constants; None: the objective needs no teacher's logits.
        inputs: per-token tensors that the objective reads, constants.
        token_weights: weight of each token's value; tokens of weight 0 are left out.  A loss may
            set more weights to 0 here than ``options.token_weights`` has, to skip tokens that
            contribute nothing; the divisor of a mean still comes from ``options.token_weights``.
        options: temperature, reduction and how the run is made.
    """
    read = [student[0], student[1].weight, student[1].bias, *inputs, token_weights]
    if teacher is not None:
        read += [teacher[0], teacher[1].weight, teacher[1].bias]
    tensor_checks.check_reverse_mode(read)
    shards = _shards(student[1], None if teacher is None else teacher[1], options)
    rank = 0 if shards is None else shards.rank
    hidden, weight, bias = student[1].operands(student[0], rank)
    wide = accumulation_dtype(hidden.dtype)
    teacher_divisor = options.teacher_divisor(teacher is not None)
    teacher_operands: list[Tensor | None] = [None, None, None]
    if teacher is not None:
        operands = teacher[1].operands(teacher[0], rank, (student[1], weight))
        teacher_operands = [None if part is None else part.detach() for part in operands]
    row_weights = None
    if token_weights is not None:
        weights = token_weights.detach().to(wide).reshape(-1)
        row_weights = (weights if options.is_reduced else (weights != 0).to(wide))[:, None]
    settings = RunSettings(
        student[1].shaping(options.temperature),
        None if teacher is None else teacher[1].shaping(teacher_divisor),
        options.is_reduced,
        options.compact,
        options.backend,
        options.chunk_size,
        options.sparse_tolerance,
        shards,
        options.gradient == "auto",
    )
    wanted = [
        tensor is not None and tensor.requires_grad and torch.is_grad_enabled()
        for tensor in (hidden, weight, bias)
    ]
    flat = torch.ops.fused_sd.chunked_run(
        hidden,
        weight,
        bias,
        *teacher_operands,
        row_weights,
        [_flat(tensor, student[0].shape[:-1]) for tensor in inputs],
        *encode((objective, settings)),
        wanted,
    )
    total, values, _, sparse, extras = structured(flat)
    extras = [extra.detach() for extra in extras]
    certificate = None
    if settings.tolerance is not None and any(wanted):
        is_dense = torch.zeros_like(sparse.kept, dtype=torch.bool)
        is_dense = is_dense.index_fill(0, sparse.dense_tokens, True) & (sparse.norm != 0)
        certificate = GradientCertificate(sparse.kept, is_dense, sparse.dropped, sparse.norm)
        certificate = GradientCertificate(*(tensor.detach() for tensor in certificate))
    if options.is_reduced:
        return Applied(total, values.detach(), extras, certificate)
    return Applied(total.detach(), values, extras, certificate)


def _shards(student: LMHead, teacher: LMHead | None, options: Options) -> Shards | None:
    """How both sides' vocabulary is cut between the ranks: at the same borders."""
    group, sizes = options.process_group, student.shard_sizes
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
    return Shards(group.group_name, group.rank(), tuple(counts), options.reduce_dhidden)


def _flat(tensor: Tensor, shape: torch.Size) -> Tensor:
    """(..., rest) as (N, rest), integers as int64."""
    flat = tensor.detach().reshape(shape.numel(), *tensor.shape[len(shape) :])
    return flat if flat.is_floating_point() else flat.long()
