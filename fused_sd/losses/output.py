"""What a loss returns, and how its tokens are reduced."""

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from fused_sd.engine.apply import ChunkedResult
from fused_sd.engine.certificate import GradientCertificate

Reduction = Literal["sum", "mean", "none"]


class LossOutput(NamedTuple):
    """A loss to call ``backward`` on, and what to log.

    Attributes:
        loss: (), or (...) for ``reduction="none"``; differentiable; fp32 (fp64 for fp64 operands).
        token_loss: (...), detached, before weighting; 0 for a token of weight 0.
        metrics: what was asked for, each (...) and detached; 0 for a token of weight 0.
        certificate: of ``gradient="sparse"``, where a gradient is wanted: how far it is from dense.
        with_grad: what was asked for beside the divergence, each (...) and differentiable, not
            weighted; 0 for a token of weight 0.  None: nothing was.
    """

    loss: Tensor
    token_loss: Tensor
    metrics: dict[str, Tensor]
    certificate: GradientCertificate | None = None
    with_grad: dict[str, Tensor] | None = None


def reduce_loss(
    walked: ChunkedResult,
    token_loss: Tensor,  # (N,)
    extras: dict[str, Tensor],  # each (N, ...)
    token_weights: Tensor | None,  # (...)
    reduction: Reduction,
    shape: torch.Size,
) -> LossOutput:
    """Shape a walk's result as the caller asked for it."""
    if reduction == "none":
        loss = walked.values[:, 0].reshape(shape)
        if token_weights is not None:
            loss = loss * token_weights.to(loss.dtype)
    elif reduction == "sum":
        loss = walked.total
    elif token_weights is None:
        loss = walked.total / max(shape.numel(), 1)
    else:
        weight = token_weights.sum(dtype=walked.total.dtype)
        loss = walked.total / torch.where(
            weight == 0, 1, weight
        )  # no weight, no loss: 0 and not NaN
    metrics = {name: values.reshape(*shape, *values.shape[1:]) for name, values in extras.items()}
    certificate = walked.certificate
    if certificate is not None:
        certificate = GradientCertificate(*(tensor.reshape(shape) for tensor in certificate))
    return LossOutput(loss, token_loss.reshape(shape).detach(), metrics, certificate)
