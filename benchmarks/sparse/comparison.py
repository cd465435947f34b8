"""What the runs say: sparse arms against the dense one, by the dense seeds' spread."""

import math
from collections.abc import Sequence
from statistics import fmean, stdev
from typing import Any

from benchmarks.sparse.arms import DENSE
from benchmarks.sparse.replay import OTHER

Curve = Sequence[Sequence[float]]  # (step, value)


def compare_curves(dense: Sequence[Curve], other: Sequence[Curve]) -> list[dict[str, float]]:
    """Of each look: both means, the dense seeds' spread and the difference, paired by seed.

    ``distance`` is the difference of the means over the standard error that two independent sets of
    dense seeds would have: about 1 where nothing but chance tells the arms apart.
    """
    looks = []
    for points, others in zip(zip(*dense), zip(*other), strict=True):
        one, two = [value for _, value in points], [value for _, value in others]
        spread = stdev(one)
        difference = fmean(two) - fmean(one)
        chance = spread * math.sqrt(1 / len(one) + 1 / len(two))
        looks.append(
            {
                "step": points[0][0],
                "dense": fmean(one),
                "other": fmean(two),
                "spread": spread,
                "difference": difference,
                "paired_spread": stdev([b - a for a, b in zip(one, two)]),
                "distance": difference / chance if chance else 0.0,
            }
        )
    return looks


def compare_online(runs: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Arm -> curves' names -> looks, and what its certificates said.

    Args:
        runs: by arm, one a seed, the seeds in the same order.
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
    """Means over the steps of all runs."""
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
    """Arm -> means over the draws: distances from the dense arm, and of the losses' curves.

    ``loss gap`` is the root mean square of the difference of a step's losses, over the fall of the
    dense arm's loss from the first to the lowest step.
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
        if name != OTHER:  # another draw's losses are those of other tokens
            row["loss gap"] = fmean(_gap(dense["steps"], arm["steps"]) for dense, arm in arms)
            row |= certificates([arm for _, arm in arms])
        found[name] = row
    return found


def _gap(dense: Sequence[dict[str, float]], other: Sequence[dict[str, float]]) -> float:
    ours, theirs = [step["loss"] for step in dense], [step["loss"] for step in other]
    square = fmean((a - b) ** 2 for a, b in zip(ours, theirs, strict=True))
    return math.sqrt(square) / (ours[0] - min(ours))
