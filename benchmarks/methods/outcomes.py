"""What the runs of an experiment come to: values by arm and unit, and contrasts between arms."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean
from typing import Any

import numpy

from benchmarks.methods.experiments import Experiment, Unit
from benchmarks.methods.records import Records
from benchmarks.methods.runs import final
from benchmarks.methods.statistics import Estimate, estimate

Runs = dict[str, dict[int, list[dict[str, Any]]]]
"""The values of the final runs, by arm and by base model."""

LEVEL = 0.8
"""The accuracy up to which ``generations`` counts."""


def finished(experiment: Experiment, records: Records) -> Runs:
    """Return the final runs of the units that all arms have finished, seed by seed."""
    found: dict[Unit, dict[str, Any]] = {}
    for run in final(experiment, records):
        record = records.find(run.decided_by)
        if record is not None:
            found.setdefault(run.unit, {})[run.arm.name] = record.values
    whole = {unit: arms for unit, arms in found.items() if len(arms) == len(experiment.arms)}
    runs: Runs = {arm.name: {} for arm in experiment.arms}
    for unit, arms in whole.items():
        for name, values in arms.items():
            runs[name].setdefault(unit.base, []).append(values)
    return runs


def last(name: str) -> Callable[[Any], float]:
    """Return a function of a run: a quantity in its last evaluation."""
    return lambda run: float(run["curve"][-1][name])


def gain(run: Any) -> float:
    """Return what the accuracy has risen by."""
    return float(run["curve"][-1]["accuracy"] - run["curve"][0]["accuracy"])


def mean_accuracy(run: Any) -> float:
    """Return the mean accuracy over the generations: the area under the curve."""
    x = [look["generations"] for look in run["curve"]]
    y = [look["accuracy"] for look in run["curve"]]
    return float(numpy.trapezoid(y, x) / (x[-1] - x[0]))


def late_change(run: Any) -> float:
    """Return the change of the accuracy over the last third of the steps."""
    steps = run["curve"][-1]["step"]
    before = [look for look in run["curve"] if look["step"] <= 2 * steps / 3]
    return float(run["curve"][-1]["accuracy"] - before[-1]["accuracy"])


def generations(run: Any) -> float:
    """Return the logarithm of the generations up to ``LEVEL``; at most those of the whole run."""
    curve = run["curve"]
    for one, two in pairwise(curve):
        if two["accuracy"] >= LEVEL:
            rise = max(two["accuracy"] - one["accuracy"], 1e-9)
            share = min(1.0, max(0.0, (LEVEL - one["accuracy"]) / rise))
            reached = one["generations"] + share * (two["generations"] - one["generations"])
            return math.log(max(reached, 1.0))
    return math.log(curve[-1]["generations"])


def found_in(attempts: int) -> Callable[[Any], float]:
    """Return a function of a search: the share of the questions that so many attempts solve."""
    return lambda run: float(run["probability"][str(attempts)])


def blame(state: str, kind: str, by: str = "verdict") -> Callable[[Any], float]:
    """Return a function of a run: how often a planted error is the most blamed token.

    Args:
        state: The model that judges, a key of the run's ``states``.
        kind: The kind of error, one of ``planted.KINDS``.
        by: Who blames, one of ``planted.TEACHERS``, or "student alone" for plain surprise.
    """
    return lambda run: float(run["states"][state]["planted"][kind][by]["precision"])


def change(after: Callable[[Any], float], before: Callable[[Any], float]) -> Callable[[Any], float]:
    """Return the difference of two functions of a run."""
    return lambda run: after(run) - before(run)


_likely = blame("phase one", "likely")

METRICS: Mapping[str, Callable[[Any], float]] = {
    "accuracy": last("accuracy"),
    "sampled accuracy": last("sampled_accuracy"),
    "gain": gain,
    "mean accuracy": mean_accuracy,
    "late change": late_change,
    "generations": generations,
    "length": last("length"),
    "entropy": last("entropy"),
    "leaks": last("leaks"),
    **{f"found in {attempts}": found_in(attempts) for attempts in (16, 32, 64, 128, 256, 512)},
    "blame on likely errors, after phase 1": _likely,
    "blame on slips, after phase 1": blame("phase one", "slip"),
    "blame on likely errors, beyond surprise": change(
        _likely, blame("phase one", "likely", "student alone")
    ),
    "blame on likely errors, gained by phase 1": change(_likely, blame("base", "likely")),
}


@dataclass(frozen=True)
class Contrast:
    """One number that a claim speaks of.

    Attributes:
        metric: A key of ``METRICS``.
        arm: The arm it is measured on.
        against: The arm that is subtracted, unit by unit; None: nothing is.
        sign: 1 if the claim is that the number is above the margin, -1 if it is below.
        margin: What the claim compares the number with.
        beyond: Another experiment, whose own number is subtracted, base by base; None: none is.
    """

    metric: str
    arm: str
    against: str | None = None
    sign: int = 1
    margin: float = 0.0
    beyond: str | None = None

    @property
    def is_difference(self) -> bool:
        """Whether the number is a difference, in which 0 means that nothing differs."""
        changes = ("late change", "gained", "beyond")
        return self.against is not None or any(word in self.metric for word in changes)

    def by_unit(self, runs: Runs) -> dict[int, float]:
        """Return the number for each unit."""
        values = by_unit(runs, self.arm, self.metric)
        if self.against is not None:
            others = by_unit(runs, self.against, self.metric)
            values = {unit: value - others[unit] for unit, value in values.items()}
        return values

    def estimate(self, name: str, runs: Mapping[str, Runs]) -> Estimate | None:
        """Return the number with its interval over the units; None: too few of them have run.

        Args:
            name: The experiment.
            runs: The finished runs of every experiment.
        """
        values = self.by_unit(runs[name]) if runs[name] else {}
        if self.beyond is not None:
            others = self.by_unit(runs[self.beyond]) if runs[self.beyond] else {}
            values = {unit: values[unit] - others[unit] for unit in values if unit in others}
        return estimate(list(values.values())) if len(values) > 1 else None


def by_unit(runs: Runs, arm: str, metric: str) -> dict[int, float]:
    """Return a metric's mean over each unit's runs."""
    measure = METRICS[metric]
    return {base: fmean(map(measure, found)) for base, found in runs[arm].items()}


def curve(runs: Runs, arm: str, name: str) -> list[tuple[float, Estimate]]:
    """Return an arm's curve: generations and the estimate of one quantity.

    Runs of one arm may differ in the generations of a look, where a method itself decides how many
    it takes: the mean of them is the look's place.
    """
    units = list(runs[arm].values())
    points = []
    for number in range(min(len(run["curve"]) for unit in units for run in unit)):
        means = [fmean(run["curve"][number][name] for run in unit) for unit in units]
        places = [run["curve"][number]["generations"] for unit in units for run in unit]
        points.append((fmean(places), estimate(means)))
    return points


def searched(runs: Runs, arm: str) -> list[tuple[float, Estimate]]:
    """Return an arm's curve of a search: attempts and the share of questions that they solve."""
    units = list(runs[arm].values())
    counts = units[0][0]["probability"]
    return [
        (float(count), estimate([fmean(run["probability"][count] for run in u) for u in units]))
        for count in sorted(counts, key=int)
    ]
