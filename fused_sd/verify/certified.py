"""Checks of a sparse gradient's certificate against float64.

Dimension key:  A tokens with a weight, D hidden size, V vocabulary
"""

from dataclasses import replace

from torch import Tensor

from fused_sd.engine.certificate import TOLERANCE, GradientCertificate, radius
from fused_sd.engine.options import LossOptions
from fused_sd.head.lm_head import as_head
from fused_sd.losses.output import LossOutput
from fused_sd.verify.cases import Case
from fused_sd.verify.inputs import Operands
from fused_sd.verify.promises import LOSS_BOUND, Measured, gradient_bound
from fused_sd.verify.truth import Exact, hidden_gradient

ROUNDING = 1e-6  # relative rounding error of the certificate's own sums


def sparse(case: Case) -> Case:
    """Return the case of the same loss with ``gradient="sparse"`` at the default tolerance."""

    def fused(operands: Operands, run: LossOptions) -> LossOutput:
        return case.fused(operands, {**run, "gradient": "sparse"})

    return replace(case, name=f"{case.name} sparse", fused=fused)


def broken_certificate(
    measured: Measured,
    certificate: GradientCertificate,
    exact: Exact,
    operands: Operands,
    on_gpu: bool,
) -> list[str]:
    """Return a sentence for each promise on a sparse gradient that is broken.

    Args:
        measured: the errors of the loss and its gradients.
        certificate: of the kept tokens, divided by the divisor of the loss's mean.
        exact: the exact loss and gradient of the kept tokens.
        operands: the kept tokens.
        on_gpu: whether the loss ran on a GPU.
    """
    dtype = operands.hidden.dtype
    rounding = gradient_bound(dtype, measured.kl, on_gpu)
    norm, dropped = certificate.norm.double(), certificate.dropped.double()
    states, dlogits = operands.hidden.double(), exact.dlogits
    dhidden = hidden_gradient(dlogits, operands.weight).norm()
    dweight = ((dlogits @ dlogits.T) * (states @ states.T)).sum().sqrt()
    true_norm = dlogits.abs().sum(-1)
    farthest, _ = radius(as_head(operands.weight, "weight"))
    by_hidden = (dropped * farthest.double()).norm()  # whose rounding is the bound's other part
    by_weight = (dropped * states.norm(dim=-1)).sum()
    promised = {  # a number and its bound
        "the error of loss": (measured.fused.loss, LOSS_BOUND[dtype]),
        "the share that is dropped": (_ratio(dropped.sum(), norm.sum()), TOLERANCE),
        "the error of the certificate's norm": (
            _ratio((norm - true_norm).abs().sum(), true_norm.sum()),
            rounding,
        ),
        "the error of dhidden": (
            measured.fused.dhidden,
            _ratio(by_hidden, dhidden) + rounding,
        ),
        "the error of dweight": (
            measured.fused.dweight,
            _ratio(by_weight, dweight) + rounding,
        ),
    }
    return [
        f"{measured.where}: {name} must be at most {bound:.1e}, got {value:.1e}"
        for name, (value, bound) in promised.items()
        if not value <= bound * (1 + ROUNDING)  # also true for a NaN
    ]


def _ratio(part: Tensor, whole: Tensor) -> float:
    return float(part / whole) if whole else float(part)
