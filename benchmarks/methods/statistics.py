"""Intervals, verdicts and power of means over units; the arithmetic is scipy's.

A unit is one base model with its own questions, habits and seeds.  Within an experiment a value is
the mean over a unit's runs, a difference is taken within each unit, and Student's t over the units
gives the interval: it covers whatever a unit draws.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

from scipy import stats

CONFIDENCE = 0.95
POWER = 0.8
SHOWN, NOT_SHOWN, CONTRADICTED = "shown", "not shown", "contradicted"


@dataclass(frozen=True)
class Estimate:
    """A mean over units with its 95 % interval.

    Attributes:
        mean: The mean.
        low: The interval's lower end.
        high: The interval's upper end.
        units: The number of units.
    """

    mean: float
    low: float
    high: float
    units: int

    def verdict(self, sign: int, margin: float = 0.0) -> str:
        """Say whether the interval lies wholly on one side of a claim's margin.

        Args:
            sign: 1 if the claim is that the mean is above the margin, -1 if it is below.
            margin: What the claim compares with.
        """
        low, high = sorted((sign * (self.low - margin), sign * (self.high - margin)))
        return SHOWN if low > 0 else CONTRADICTED if high < 0 else NOT_SHOWN


def estimate(values: Sequence[float]) -> Estimate:
    """Return the mean of one value for each unit, with Student's interval.

    Raises:
        ValueError: There are fewer than two values.
    """
    if len(values) < 2:
        raise ValueError(f"an interval needs at least 2 units, got {len(values)}; make more runs")
    mean = fmean(values)
    if stdev(values) < 1e-9:  # equal but for rounding
        return Estimate(mean, mean, mean, len(values))
    low, high = stats.ttest_1samp(values, 0.0).confidence_interval(CONFIDENCE)
    return Estimate(mean, float(low), float(high), len(values))


def power(units: int, deviation: float, difference: float) -> float:
    """Return how probably the interval of so many units leaves out 0, given a true difference.

    Args:
        units: The number of units.
        deviation: The standard deviation of the paired differences between units.
        difference: The true mean difference.
    """
    freedom = units - 1
    limit = stats.t.ppf((1 + CONFIDENCE) / 2, freedom)
    shift = difference * units**0.5 / deviation
    return float(stats.nct.sf(limit, freedom, shift) + stats.nct.cdf(-limit, freedom, shift))


def units_needed(deviation: float, difference: float) -> int:
    """Return the fewest units that see a difference with 80 % power."""
    units = 2
    while power(units, deviation, difference) < POWER:
        units += 1
    return units
