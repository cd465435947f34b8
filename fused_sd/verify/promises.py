"""What ``fused_sd verify`` holds the library to, and the sentence for each promise that breaks.

Dimension key:  N tokens, D hidden size, V vocabulary
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from fused_sd.engine.certificate import GradientCertificate
from fused_sd.verify.cases import Case
from fused_sd.verify.inputs import Operands

# relative, the gradients by norm; 16-bit gradients are rounded, which alone is 0.17 % in bf16
GRADIENT_BOUND = {
    torch.float64: 1e-10,
    torch.float32: 1e-5,
    torch.bfloat16: 3e-3,
    torch.float16: 3e-3,
}
# on a GPU the gradient of the logits is bf16 too, for the GEMMs that follow: the parts that rows of
# the head have in common cancel in dH, their rounding does not, and 0.29 to 0.38 % come out
GPU_GRADIENT_BOUND = {torch.bfloat16: 5e-3}
# from a KL of 1e-5 on; in float64 it is the definition, a difference of logarithms, that cancels
LOSS_BOUND = {
    torch.float64: 1e-8,
    torch.float32: 5e-3,
    torch.bfloat16: 5e-3,
    torch.float16: 5e-3,
}
FLOOR = 1e-6  # below it, being worse than rounded logits is luck


class Result(NamedTuple):
    """A loss and its gradients."""

    loss: Tensor  # ()
    dhidden: Tensor  # (N, D)
    dweight: Tensor  # (V, D)


class Errors(NamedTuple):
    """Relative errors: of the loss, of the gradients by norm, and of their worst element.

    The loss's is of the mean absolute token loss: that is the loss itself where no token's is
    negative, and does not vanish where positive and negative advantages cancel.
    """

    loss: float
    dhidden: float
    dweight: float
    worst: float  # of the largest element of its gradient


class Sparsity(NamedTuple):
    """How sparse a gradient w.r.t. the logits is, by its certificate."""

    entries: float  # mean number of kept entries of the tokens whose gradient is sparse
    dense_share: float  # share of the tokens whose gradient is dense
    dropped_share: float  # share of the gradient's L1 norm that is dropped

    @classmethod
    def of(cls, certificate: GradientCertificate, counted: Tensor) -> "Sparsity":
        """Average a certificate over the tokens of ``counted`` (N,) bool."""
        dense = certificate.dense[counted]
        kept = certificate.kept[counted][~dense].double()
        return cls(
            float(kept.mean()) if kept.numel() else 0.0,
            float(dense.double().mean()) if dense.numel() else 0.0,
            float(certificate.dropped_share),
        )


@dataclass(frozen=True)
class Measured:
    """One loss at one KL."""

    name: str
    kl: float | None  # None where the loss knows no teacher's distribution
    fused: Errors
    rounded: Errors  # of the definition on 16-bit logits
    kept: Sparsity | None = None  # None: the gradient is dense

    @property
    def where(self) -> str:
        return self.name if self.kl is None else f"{self.name} at KL {self.kl:.1e}"


def gradient_bound(dtype: torch.dtype, kl: float | None, on_gpu: bool) -> float:
    """The largest relative error of a gradient.

    The gradient of a divergence is a difference of distributions, which shrinks with sqrt(KL) while
    the error of fp32 logits near 25, some 1e-6, does not.  fp32 gradients show it; 16-bit ones are
    rounded more coarsely than that.
    """
    bound = GRADIENT_BOUND[dtype]
    if on_gpu:
        bound = GPU_GRADIENT_BOUND.get(dtype, bound)
    if dtype == torch.float32 and kl is not None:
        bound /= math.sqrt(min(kl, 1.0))
    return bound


def broken_accuracy(measured: Measured, dtype: torch.dtype, on_gpu: bool) -> list[str]:
    """The promises on errors that a measurement breaks."""
    broken = []
    gradient = gradient_bound(dtype, measured.kl, on_gpu)
    bounds = {"loss": LOSS_BOUND[dtype], "dhidden": gradient, "dweight": gradient}
    for name, bound in bounds.items():
        fused, rounded = getattr(measured.fused, name), getattr(measured.rounded, name)
        rule = f"{measured.where}: the error of {name} must be at most"
        if not fused <= bound:  # a NaN is within no bound
            broken.append(f"{rule} {bound:.1e}, got {fused:.1e}")
        if not fused <= rounded + FLOOR:
            broken.append(f"{rule} that of 16-bit logits, {rounded:.1e}, got {fused:.1e}")
    return broken


def broken_invariants(
    run: Callable[[Case, Operands], Result], case: Case, operands: Operands
) -> list[str]:
    """The exact promises that a loss breaks: they hold to the bit or not at all."""
    broken = []
    first, again = run(case, operands), run(case, operands)
    if not identical(first, again):
        broken.append(f"{case.name}: two runs must be equal to the bit, got different results")
    spoiled = run(case, operands.spoiled())
    masked = operands.token_weights == 0
    if not identical(first, spoiled) or bool(spoiled.dhidden[masked].any()):
        broken.append(
            f"{case.name}: a masked token that holds NaN must contribute exactly 0, got another "
            "loss or gradient with it"
        )
    if case.against == "distribution":
        equal = run(case, replace(operands, teacher=operands.hidden.detach().clone()))
        if any(bool(part.isnan().any() or part.any()) for part in equal):
            largest = max(float(part.abs().max()) for part in equal)
            broken.append(
                f"{case.name}: a teacher equal to the student must give loss and gradient exactly "
                f"0, got {largest:.1e}"
            )
    return broken


def identical(one: Result, other: Result) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
