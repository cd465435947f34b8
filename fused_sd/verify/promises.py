"""What the library promises of its numbers, and the sentence for each promise that is broken.

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

# relative errors of gradients by norm; rounding a gradient to bf16 alone is 0.17 %
GRADIENT_BOUND = {
    torch.float64: 1e-10,
    torch.float32: 1e-5,
    torch.bfloat16: 3e-3,
    torch.float16: 3e-3,
}
# On a GPU the GEMMs take dlogits in bf16 too.  What the rows of the head have in common cancels in
# dhidden, but the rounding does not: 0.29 to 0.38 % were measured.
GPU_GRADIENT_BOUND = {torch.bfloat16: 5e-3}
# from a KL of 1e-5 on; the float64 bound is the error of the definition, a difference of logarithms
LOSS_BOUND = {
    torch.float64: 1e-8,
    torch.float32: 5e-3,
    torch.bfloat16: 5e-3,
    torch.float16: 5e-3,
}
FLOOR = 1e-6  # being worse than rounded logits by less than this is chance


class Result(NamedTuple):
    """A loss and its gradients."""

    loss: Tensor  # ()
    dhidden: Tensor  # (N, D)
    dweight: Tensor  # (V, D)


class Errors(NamedTuple):
    """Relative errors: of the loss, of the gradients by norm, and of their worst element.

    The loss's error is relative to the mean absolute token loss.  That is the loss itself if no
    token's is negative, and it does not vanish if positive and negative advantages cancel.
    """

    loss: float
    dhidden: float
    dweight: float
    worst: float  # relative to the largest element of the same gradient


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
    """Errors of one loss at one KL."""

    name: str
    kl: float | None  # None: the loss has no teacher
    fused: Errors
    rounded: Errors  # of the definition, applied to 16-bit logits
    kept: Sparsity | None = None  # None: the gradient is dense

    @property
    def where(self) -> str:
        """The loss and the KL in words."""
        return self.name if self.kl is None else f"{self.name} at KL {self.kl:.1e}"


def gradient_bound(dtype: torch.dtype, kl: float | None, on_gpu: bool) -> float:
    """Return the largest relative error that is promised of a gradient.

    The gradient of a divergence is a difference of distributions.  It shrinks with sqrt(KL), but
    the error of fp32 logits near 25, about 1e-6, does not.  fp32 gradients show that error; 16-bit
    gradients are rounded more coarsely.
    """
    bound = GRADIENT_BOUND[dtype]
    if on_gpu:
        bound = GPU_GRADIENT_BOUND.get(dtype, bound)
    if dtype == torch.float32 and kl is not None:
        bound /= math.sqrt(min(kl, 1.0))
    return bound


def broken_accuracy(measured: Measured, dtype: torch.dtype, on_gpu: bool) -> list[str]:
    """Return a sentence for each promise on errors that is broken."""
    broken = []
    gradient = gradient_bound(dtype, measured.kl, on_gpu)
    bounds = {"loss": LOSS_BOUND[dtype], "dhidden": gradient, "dweight": gradient}
    for name, bound in bounds.items():
        fused, rounded = getattr(measured.fused, name), getattr(measured.rounded, name)
        rule = f"{measured.where}: the error of {name} must be at most"
        if not fused <= bound:  # also true for a NaN
            broken.append(f"{rule} {bound:.1e}, got {fused:.1e}")
        if not fused <= rounded + FLOOR:
            broken.append(f"{rule} that of 16-bit logits, {rounded:.1e}, got {fused:.1e}")
    return broken


def broken_invariants(
    run: Callable[[Case, Operands], Result], case: Case, operands: Operands
) -> list[str]:
    """Return a sentence for each exact promise that is broken: these hold to the bit."""
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
    """Whether two results are equal to the bit."""
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
