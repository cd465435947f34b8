"""What ``fused_sd verify`` holds the library to, and the sentence for each promise that breaks.

Dimension key:  N tokens, D hidden size, V vocabulary
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from fused_sd.verify_cases import Case
from fused_sd.verify_inputs import Operands

LOSS_BOUND, GRADIENT_BOUND = 5e-3, 3e-3  # relative, the gradients by norm
WIDE_GRADIENT_BOUND = {torch.float64: 1e-10, torch.float32: 1e-5}
FLOOR = 1e-6  # below it, being worse than rounded logits is luck


class Result(NamedTuple):
    """A loss and its gradients."""

    loss: Tensor  # ()
    dhidden: Tensor  # (N, D)
    dweight: Tensor  # (V, D)


class Errors(NamedTuple):
    """Relative errors: of the loss, of the gradients by norm, and of their worst element."""

    loss: float
    dhidden: float
    dweight: float
    worst: float  # of the largest element of its gradient


@dataclass(frozen=True)
class Measured:
    """One loss at one KL."""

    name: str
    kl: float | None  # None where the loss knows no teacher's distribution
    fused: Errors
    rounded: Errors  # of the definition on 16-bit logits

    @property
    def where(self) -> str:
        return self.name if self.kl is None else f"{self.name} at KL {self.kl:.1e}"


def broken_accuracy(measured: Measured, dtype: torch.dtype) -> list[str]:
    """The promises on errors that a measurement breaks."""
    broken = []
    bounds = {
        "loss": LOSS_BOUND,
        "dhidden": gradient_bound(dtype, measured.kl),
        "dweight": gradient_bound(dtype, measured.kl),
    }
    for name, bound in bounds.items():
        fused, rounded = getattr(measured.fused, name), getattr(measured.rounded, name)
        if not fused <= bound:  # NaN is not within any bound
            broken.append(f"{measured.where}: error of {name} must be at most {bound:.1e}, got "
                          f"{fused:.1e}")
        if not fused <= rounded + FLOOR:
            broken.append(
                f"{measured.where}: error of {name} must be at most that of 16-bit logits "
                f"({rounded:.1e}), got {fused:.1e}"
            )
    return broken


def gradient_bound(dtype: torch.dtype, kl: float | None) -> float:
    """The largest relative error of a gradient.

    A gradient is the difference of two distributions, about sqrt(2 KL) of them.  fp32 logits carry
    about 1e-6 of their own, so fp32 operands can promise 1e-5 only down to a KL of 0.1, and that
    much divided by the difference below; rounding to 16 bits hides it.
    """
    bound = WIDE_GRADIENT_BOUND.get(dtype, GRADIENT_BOUND)
    if dtype == torch.float32 and kl is not None and kl > 0:
        bound *= max(1.0, math.sqrt(0.1 / kl))
    return bound


def broken_invariants(
    run: Callable[[Case, Operands], Result], case: Case, operands: Operands
) -> list[str]:
    """The exact promises that a loss breaks: they hold to the bit or not at all."""
    broken, masked = [], operands.token_weights == 0
    first, again = run(case, operands), run(case, operands)
    if not _identical(first, again):
        broken.append(f"{case.name}: two runs must be equal to the bit, got different results")
    spoiled = run(case, operands.spoiled())
    if not _identical(first, spoiled) or bool(spoiled.dhidden[masked].any()):
        broken.append(
            f"{case.name}: a masked token that holds NaN must contribute exactly 0, got another "
            "loss or gradient than without it"
        )
    if case.against == "distribution":
        equal = run(case, replace(operands, teacher=operands.hidden.detach().clone()))
        if any(bool(part.isnan().any() or part.any()) for part in equal):
            largest = max(float(part.abs().max()) for part in equal)
            broken.append(
                f"{case.name}: a teacher equal to the student must give exactly 0, got {largest:.1e}"
            )
    return broken


def _identical(one: Result, other: Result) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
