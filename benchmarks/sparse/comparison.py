"""Comparison of the sparse arm with the dense one, measured by the spread of the dense seeds."""

import math
from collections.abc import Sequence
from statistics import fmean, stdev
from typing import Any

from benchmarks.sparse.arms import DENSE
from benchmarks.sparse.replay import OTHER

Curve = Sequence[Sequence[float]]  # (step, value) points


def compare_curves(dense: Sequence[Curve], other: Sequence[Curve]) -> list[dict[str, float]]:
    """Return for each evaluation both means, their difference, and the spreads over the seeds.

    ``distance`` is the difference of the means over the standard error of the difference between
    two independent sets of dense seeds: it is about 1 if only chance separates the arms.
    """
    looks = []
    for points, other_points in zip(zip(*dense), zip(*other), strict=True):
        values, others = ([value for _, value in some] for some in (points, other_points))
        spread = stdev(values)
        difference = fmean(others) - fmean(values)
        standard_error = spread * math.sqrt(1 / len(values) + 1 / len(others))
        looks.append(
            {
                "step": points[0][0],
                "dense": fmean(values),
                "other": fmean(others),
                "spread": spread,
                "difference": difference,
                "paired_spread": stdev([b - a for a, b in zip(values, others)]),
                "distance": difference / standard_error if standard_error else 0.0,
            }
        )
    return looks


def compare_online(runs: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Return for each sparse arm the compared curves, by name, and its certificates.

    Args:
        runs: For each arm one run a seed, the seeds in the same order.
    """
    dense = runs[DENSE.name]
    found: dict[str, Any] = {}
    for name, others in runs.items():
        if name == DENSE.name:
            continue
        curves = {
            curve: compare_curves(
                [run["curves"][curve] for run in dense], [run["curves"][curve] for run in others]
            )
            for curve in dense[0]["curves"]
        }
        found[name] = {"curves": curves, "certificates": certificates(others)}
    return found


def certificates(runs: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Return the certificates of all runs' steps as one: sums, shares and means."""
    steps = [step for run in runs for step in run["steps"]]
    tokens, dense = sum(step["tokens"] for step in steps), sum(step["dense"] for step in steps)
    entries = sum(step["entries"] * (step["tokens"] - step["dense"]) for step in steps)
    return {
        "tokens": tokens,
        "dense_share": dense / tokens,
        "entries": entries / max(1.0, tokens - dense),
        "dropped": fmean(step["dropped"] for step in steps),
        "largest_dropped": max(step["dropped"] for step in steps),
    }


def compare_replay(runs: Sequence[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Return for each arm its distances from the dense arm, averaged over the draws.

    ``loss gap`` is the root mean square of the difference of the steps' losses, over the dense
    loss's fall from the first step to the lowest.
    """
    found: dict[str, dict[str, float]] = {}
    for name in runs[0]["arms"]:
        if name == DENSE.name:
            continue
        arms = [(run["arms"][DENSE.name], run["arms"][name]) for run in runs]
        names = ("KL from dense", "distance", "head distance")
        row = {key: fmean(arm[key] for _, arm in arms) for key in names}
        row["held-out gap"] = fmean(
            abs(arm["held-out loss"] - dense["held-out loss"]) for dense, arm in arms
        )
        if name != OTHER:  # another draw has other tokens, so its losses do not compare
            row["loss gap"] = fmean(_gap(dense["steps"], arm["steps"]) for dense, arm in arms)
            row |= certificates([arm for _, arm in arms])
        found[name] = row
    return found


def _gap(dense: Sequence[dict[str, float]], other: Sequence[dict[str, float]]) -> float:
    ours, theirs = [step["loss"] for step in dense], [step["loss"] for step in other]
    square = fmean((a - b) ** 2 for a, b in zip(ours, theirs, strict=True))
    return math.sqrt(square) / (ours[0] - min(ours))
