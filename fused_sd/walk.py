"""A row function over the logits of all tokens, differentiably: the way to the one operator.

Dimension key:  N tokens, D hidden size, V vocabulary, J values of a row function for each token
"""

from typing import NamedTuple

import torch
from torch import Tensor

from fused_sd import specs
from fused_sd.certificate import GradientCertificate
from fused_sd.chunk import RowFunction
from fused_sd.heads import LMHead, accumulation_dtype
from fused_sd.walk_gradients import backward, keep
from fused_sd.walk_operator import Options, structured, walk_operator

walk_operator.register_autograd(backward, setup_context=keep)


class Walked(NamedTuple):
    """What the walk returns, with the tokens flattened to N."""

    total: Tensor  # (), sum(upstream * values); differentiable when the loss is reduced inside
    values: Tensor  # (N, J); differentiable when it is not
    extras: list[Tensor]  # (N, ...), detached; 0 for a token without a weight
    certificate: GradientCertificate | None  # of a gradient that may be sparse


def walk(
    rows: RowFunction,
    student: tuple[Tensor, LMHead],
    teacher: tuple[Tensor, LMHead] | None,
    inputs: list[Tensor],  # each (..., rest)
    token_weights: Tensor | None,  # (...)
    *,
    temperature: float,
    teacher_temperature: float = 1.0,
    reduced: bool,
    compact: bool = True,
    backend: str = "auto",
    chunk_size: int | None = None,
    tolerance: float | None = None,
) -> Walked:
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
        compact: drop tokens of weight 0 before any GEMM, which waits for their number once.
        backend: "auto", "triton" or "torch".
        chunk_size: tokens in a chunk; None: by memory.
        tolerance: share of the gradient's L1 norm that may be dropped to make it sparse; None: a
            dense gradient, unless the row function has only entries.
    """
    hidden, weight, bias = student[1].operands(student[0])
    t_hidden = t_weight = t_bias = t_shaping = None
    if teacher is not None:
        t_hidden, t_weight, t_bias = teacher[1].operands(teacher[0])
        t_shaping = teacher[1].shaping(teacher_temperature)
        t_hidden, t_weight = t_hidden.detach(), t_weight.detach()
        t_bias = None if t_bias is None else t_bias.detach()
    wanted = [
        tensor is not None and tensor.requires_grad and torch.is_grad_enabled()
        for tensor in (hidden, weight, bias)
    ]
    options = Options(
        student[1].shaping(temperature), t_shaping, reduced, compact, backend, chunk_size, tolerance
    )
    wide = accumulation_dtype(hidden.dtype)
    upstream = None
    if token_weights is not None:
        weights = token_weights.detach().to(wide).reshape(-1)
        upstream = (weights if reduced else (weights != 0).to(wide))[:, None]
    flat = torch.ops.fused_sd.walk(
        hidden,
        weight,
        bias,
        t_hidden,
        t_weight,
        t_bias,
        upstream,
        [_flat(tensor, student[0].shape[:-1]) for tensor in inputs],
        *specs.encode((rows, options)),
        wanted,
    )
    total, values, _, sparse, extras = structured(flat)
    extras = [extra.detach() for extra in extras]
    certificate = None
    if tolerance is not None and any(wanted):
        is_dense = torch.zeros_like(sparse.kept, dtype=torch.bool)
        is_dense = is_dense.index_fill(0, sparse.dense_tokens, True) & (sparse.norm != 0)
        certificate = GradientCertificate(sparse.kept, is_dense, sparse.dropped, sparse.norm)
        certificate = GradientCertificate(*(tensor.detach() for tensor in certificate))
    if reduced:
        return Walked(total, values.detach(), extras, certificate)
    return Walked(total.detach(), values, extras, certificate)


def _flat(tensor: Tensor, shape: torch.Size) -> Tensor:
    """(..., rest) as (N, rest), integers as int64."""
    flat = tensor.detach().reshape(shape.numel(), *tensor.shape[len(shape) :])
    return flat if flat.is_floating_point() else flat.long()
