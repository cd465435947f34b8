"""The only tolerances of the project."""

import torch
from torch import Tensor

# of the largest reference value, for the largest error and (a tenth of it) for the root mean square
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}
EAGER_FACTOR, EAGER_FLOOR = 1.0, 1e-6


def errors(value: Tensor, reference: Tensor) -> tuple[float, float]:
    """Largest and root-mean-square error, both relative to the largest reference value."""
    difference = value.detach().double() - reference.detach().double()
    if difference.numel() == 0:
        return 0.0, 0.0
    scale = max(float(reference.detach().abs().max()), 1e-30)
    return float(difference.abs().max()) / scale, float(difference.square().mean().sqrt()) / scale


def assert_close(value: Tensor, reference: Tensor, dtype: torch.dtype, name: str = "value") -> None:
    """Equal to a float64 reference within the dtype's tolerance, by maximum and by RMS."""
    assert value.shape == reference.shape, f"{name}: {value.shape} is not {reference.shape}"
    infinite = reference.isinf()
    assert torch.equal(value[infinite].double(), reference[infinite].double()), (
        f"{name}: inf differs"
    )
    largest, rms = errors(value[~infinite], reference[~infinite])
    bound = TOLERANCE[dtype]
    assert largest <= bound, f"{name}: {describe(value, reference, largest, rms)}"
    assert rms <= bound, f"{name}: {describe(value, reference, largest, rms)}"


def assert_same_up_to_rounding(
    value: Tensor, other: Tensor, ulps: float, size: Tensor | float | None = None
) -> None:
    """Equal but for rounding: two orders of summation, say, of the same numbers.

    Args:
        ulps: how many units in the last place of ``size`` the two may be apart.
        size: of what was summed: the sum of the summands' magnitudes, or the largest of several
            such sums.  None: the magnitude of each result, where nothing cancels.
    """
    assert value.dtype == other.dtype
    assert value.shape == other.shape
    eps = torch.finfo(value.dtype).eps
    value, other = value.detach().double(), other.detach().double()
    if size is None:
        size = torch.maximum(value.abs(), other.abs())
    found = torch.where(value == other, 0, (value - other).abs() / (eps * size))
    assert (found <= ulps).all(), f"{float(found.max()):.3g} ulps apart, {ulps:g} allowed"


def assert_no_worse_than_eager(value: Tensor, eager: Tensor, reference: Tensor, name: str) -> None:
    """Error against float64 at most that of eager PyTorch in the same dtype."""
    for mine, theirs in zip(errors(value, reference), errors(eager, reference), strict=True):
        worst = describe(value, reference, *errors(value, reference))
        assert mine <= EAGER_FACTOR * theirs + EAGER_FLOOR, f"{name}: eager {theirs:.2e}; {worst}"


def describe(value: Tensor, reference: Tensor, largest: float, rms: float) -> str:
    value, reference = value.detach().double(), reference.detach().double()
    difference = (value - reference).abs().nan_to_num(torch.inf)
    at = int(difference.argmax())
    return (
        f"max {largest:.2e} rms {rms:.2e} of the largest; worst at {at}: "
        f"{float(value.flatten()[at])!r} for {float(reference.flatten()[at])!r}"
    )
