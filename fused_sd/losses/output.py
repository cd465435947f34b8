"""What a loss returns, and how its tokens are reduced."""

from typing import NamedTuple

import torch
from torch import Tensor

from fused_sd.engine.apply import Applied
from fused_sd.engine.certificate import GradientCertificate
from fused_sd.engine.options import Options


class LossOutput(NamedTuple):
    """A loss to call ``backward`` on, and what to log.

    Attributes:
        loss: (), or (...) for ``reduction="none"``; differentiable; fp32 (fp64 for fp64 operands).
        token_loss: (...), detached, before weighting; 0 for a token of weight 0.
        metrics: the metrics asked for, each (...) and detached; 0 for a token of weight 0.
        certificate: of ``gradient="sparse"`` or ``"auto"``, where a gradient is wanted: how far the
            gradient is from the dense one.
        with_grad: the values asked for beside the divergence, each (...), differentiable and not
            weighted; 0 for a token of weight 0.  None: nothing was asked for.

    Examples:
        >>> import torch, fused_sd
        >>> _ = torch.manual_seed(0)
        >>> hidden, head = torch.randn(2, 3, 16, requires_grad=True), torch.randn(100, 16)
        >>> teacher = torch.randn(2, 3, 16)
        >>> output = fused_sd.gkd_loss(hidden, head, teacher, head, metrics=("student_entropy",))
        >>> output.loss.requires_grad, output.token_loss.requires_grad
        (True, False)
        >>> {name: values.shape for name, values in output.metrics.items()}
        {'student_entropy': torch.Size([2, 3])}
    """

    loss: Tensor
    token_loss: Tensor
    metrics: dict[str, Tensor]
    certificate: GradientCertificate | None = None
    with_grad: dict[str, Tensor] | None = None


def reduce_loss(
    applied: Applied,
    token_loss: Tensor,  # (N,)
    metrics: dict[str, Tensor],  # each (N, ...)
    shape: torch.Size,
    options: Options,
) -> LossOutput:
    """Shape and reduce an objective's result as the caller asked for it."""
    token_weights = options.token_weights
    if options.reduction == "none":
        loss = applied.values[:, 0].reshape(shape)
        if token_weights is not None:
            loss = loss * token_weights.to(loss.dtype)
    elif options.reduction == "sum":
        loss = applied.total
    elif token_weights is None:
        loss = applied.total / max(shape.numel(), 1)
    else:
        weight = token_weights.sum(dtype=applied.total.dtype)
        # without any weight the loss is 0 and not NaN
        loss = applied.total / torch.where(weight == 0, 1, weight)
    metrics = {name: values.reshape(shape + values.shape[1:]) for name, values in metrics.items()}
    certificate = applied.certificate
    if certificate is not None:
        certificate = GradientCertificate(*(tensor.reshape(shape) for tensor in certificate))
    return LossOutput(loss, token_loss.reshape(shape).detach(), metrics, certificate)
