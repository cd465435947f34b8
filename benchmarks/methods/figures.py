"""One picture for each claim: the curves of its arms with their intervals."""

from pathlib import Path
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
    gap, place = 0.075 * (high - low), float("-inf")
    for value, label, colour in sorted(ends):
        place = max(value, place + gap)
        axis.annotate(
            label,
            (1.01, place),
            xycoords=("axes fraction", "data"),
            color=colour,
            fontsize=9,
            va="center",
            annotation_clip=False,
        )
