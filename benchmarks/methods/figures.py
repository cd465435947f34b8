"""One picture for each claim: the curves of its arms with their intervals."""

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from benchmarks.methods.claims import Claim
from benchmarks.methods.experiments import EXPERIMENTS
from benchmarks.methods.outcomes import Runs, curve, searched
from benchmarks.plotting import figure_at

TITLES = {
    "accuracy": "held-out accuracy, greedy, %",
    "sampled_accuracy": "held-out accuracy, sampled, %",
    "probability": "hard questions that are solved, %",
    "leaks": "responses that cite what they never read, %",
    "entropy": "entropy of the student, nat",
    "length": "tokens of a response",
}
PERCENT = ("accuracy", "sampled_accuracy", "probability", "leaks")
# Okabe and Ito's colours, which people with any colour vision tell apart, on light and dark
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")


def picture(claim: Claim, runs: Runs, path: Path) -> None:
    """Draw the curves of a claim's arms, each named at its end."""
    assert claim.pictured is not None
    path.parent.mkdir(parents=True, exist_ok=True)
    scale = 100 if claim.pictured in PERCENT else 1
    with figure_at(path, 1, figsize=(5.6, 2.8)) as (_, axis):
        ends = []
        for arm, colour in zip(claim.arms, COLOURS):
            points = searched(runs, arm) if claim.pictured == "probability" else None
            points = points or curve(runs, arm, claim.pictured)
            x = [place for place, _ in points]
            axis.plot(x, [scale * point.mean for _, point in points], color=colour)
            low, high = ([scale * getattr(p, end) for _, p in points] for end in ("low", "high"))
            axis.fill_between(x, low, high, color=colour, alpha=0.15, lw=0)
            label = EXPERIMENTS[claim.experiment].arm(arm).label
            ends.append((scale * points[-1][1].mean, label, colour))
        name_ends(axis, ends)
        axis.set_title(TITLES[claim.pictured], fontsize=9, loc="left")
        axis.grid(alpha=0.25)
        if claim.pictured == "probability":
            axis.set_xscale("log", base=2)
            axis.set_xlabel("attempts")
        else:
            axis.set_xlabel("generations")


def name_ends(axis: Any, ends: list[tuple[float, str, str]]) -> None:
    """Write the curves' names at their ends, moved apart where they would touch."""
    low, high = axis.get_ylim()
    ends = sorted(ends)
    for place, (_, label, colour) in zip(
        apart([end[0] for end in ends], 0.075 * (high - low)), ends
    ):
        axis.annotate(
            label,
            (1.01, place),
            xycoords=("axes fraction", "data"),
            color=colour,
            fontsize=9,
            va="center",
            annotation_clip=False,
        )


def apart(values: Sequence[float], gap: float) -> list[float]:
    """Return places at least ``gap`` apart for rising values, each group centred on its values."""
    groups: list[list[float]] = []
    for value in values:
        groups.append([value])
        while len(groups) > 1:
            bottom = 2 * fmean(groups[-1]) - top(groups[-1], gap)
            if top(groups[-2], gap) + gap <= bottom:
                break
            last = groups.pop()
            groups[-1] += last
    return [
        fmean(group) + gap * (number - (len(group) - 1) / 2)
        for group in groups
        for number in range(len(group))
    ]


def top(group: Sequence[float], gap: float) -> float:
    """Return the highest place of a group that is centred on its values."""
    return fmean(group) + gap * (len(group) - 1) / 2
