"""The page of claims: its tables and pictures, from the stored runs.

The page is ``docs/claims.md``.  Its prose is written by hand, the blocks between markers by
``python -m benchmarks.methods report``.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from statistics import stdev

from benchmarks.markdown import table
from benchmarks.methods.claims import CLAIMS, Claim
from benchmarks.methods.experiments import EXPERIMENTS, Experiment, Search
from benchmarks.methods.figures import picture
from benchmarks.methods.outcomes import Contrast, Runs, by_unit, finished
from benchmarks.methods.records import Records
from benchmarks.methods.runs import best_rate, selected
from benchmarks.methods.statistics import CONTRADICTED, NOT_SHOWN, SHOWN, Estimate, units_needed
from fused_sd.measuring.markdown_block import Block

PAGE = "claims.md"
PARTLY, NOT_RUN = "partly shown", "not run"
IN_UNITS = {"length": "tokens", "entropy": "nat", "generations": "times"}  # all others: points
DIFFERENCE = 0.02  # the difference that the words about power speak of


def write_page(results: Path, docs: Path) -> list[Path]:
    """Fill the page's blocks and draw its pictures; return the files that were written."""
    page, written = docs / PAGE, [docs / PAGE]
    records = {name: Records(results / e.file) for name, e in EXPERIMENTS.items()}
    runs = {name: outcome(e, records[name]) for name, e in EXPERIMENTS.items()}
    Block(page, "claims").fill(summary_lines(runs))
    for name, experiment in EXPERIMENTS.items():
        Block(page, f"experiment {name}").fill(arm_lines(experiment, runs, records[name]))
    for claim in CLAIMS:
        Block(page, f"claim {claim.name}").fill(claim_lines(claim, runs))
        if runs[claim.experiment] and claim.pictured:
            written.append(docs / "images" / "claims" / f"{claim.name}.png")
            picture(claim, runs[claim.experiment], written[-1])
    return written


def outcome(experiment: Experiment, records: Records) -> Runs:
    """Return the finished runs of an experiment; nothing where there are not two units."""
    try:
        runs = finished(experiment, records)
    except ValueError:  # no rate has been selected yet
        return {}
    return runs if all(len(units) > 1 for units in runs.values()) else {}


def verdicts(claim: Claim, runs: Mapping[str, Runs]) -> list[str]:
    """Return the verdict on each contrast of a claim."""
    found = []
    for contrast in claim.contrasts:
        number = contrast.estimate(claim.experiment, runs)
        found.append(number.verdict(contrast.sign, contrast.margin) if number else NOT_RUN)
    return found


def together(found: list[str]) -> str:
    """Return what the verdicts on a claim's contrasts come to."""
    if len(set(found)) == 1:
        return found[0]
    if SHOWN in found:
        return PARTLY
    return CONTRADICTED if CONTRADICTED in found else NOT_SHOWN


def summary_lines(runs: Mapping[str, Runs]) -> list[str]:
    """Return the table of all claims with their first numbers and verdicts."""
    rows = []
    for claim in CLAIMS:
        first = claim.contrasts[0]
        number = first.estimate(claim.experiment, runs)
        words = shown(first, number) if number else ""
        link = f"[{claim.says}](#{claim.name})"
        rows.append([claim.paper, link, words, together(verdicts(claim, runs))])
    return table(("paper", "claim", "first number, 95 % interval", "verdict"), rows)


def shown(contrast: Contrast, estimate: Estimate) -> str:
    """Return an estimate with its interval, in the unit of its metric."""
    values = (estimate.mean, estimate.low, estimate.high)
    sign = "+" if contrast.is_difference else ""
    unit = IN_UNITS.get(contrast.metric)
    if unit == "times":
        mean, low, high = (f"{math.exp(value):.2f}" for value in values)
    elif unit is not None:
        mean, low, high = (f"{value:{sign}.2f}" for value in values)
    else:
        unit = "points" if sign else "%"
        mean, low, high = (f"{100 * value:{sign}.1f}" for value in values)
    return f"{mean} {unit} ({low} to {high})"


def claim_lines(claim: Claim, runs: Mapping[str, Runs]) -> list[str]:
    """Return a claim's table and its picture."""
    rows = []
    for contrast, verdict in zip(claim.contrasts, verdicts(claim, runs)):
        number = contrast.estimate(claim.experiment, runs)
        words = [shown(contrast, number), f"{number.units}"] if number else ["", ""]
        rows.append([described(contrast, EXPERIMENTS[claim.experiment]), *words, verdict])
    lines = table(("measured (claimed)", "mean, 95 % interval", "units", "verdict"), rows)
    if runs[claim.experiment] and claim.pictured:
        lines += ["", f"![{claim.says}](images/claims/{claim.name}.png)"]
    return lines


def described(contrast: Contrast, experiment: Experiment) -> str:
    """Return what a contrast measures and what the claim says of it."""
    words = f"{experiment.arm(contrast.arm).label}: {contrast.metric}"
    if contrast.against is not None:
        words += f", against {experiment.arm(contrast.against).label}"
    if contrast.beyond is not None:
        words += f', more than in "{contrast.beyond}"'
    side = "above" if contrast.sign > 0 else "below"
    unit = IN_UNITS.get(contrast.metric)
    margin = 1.0 if unit == "times" else contrast.margin * (1 if unit else 100)
    return f"{words} ({side} {margin:.3g})"


def arm_lines(experiment: Experiment, runs: Mapping[str, Runs], records: Records) -> list[str]:
    """Return the table of an experiment's arms, its size and its power."""
    found = runs[experiment.name]
    if not found:
        return ["Not run yet."]
    chosen = {name: best_rate(rates) for name, rates in selected(experiment, records).items()}
    if isinstance(experiment.scale, Search):
        metrics = [f"found in {count}" for count in experiment.scale.counts]
    else:
        metrics = ["accuracy", "sampled accuracy", "length", "entropy", "leaks"]
    rows = []
    for arm in experiment.arms:
        rate = f"{chosen[arm.name]:g}" if arm.name in chosen else ""
        numbers = [
            shown(Contrast(metric, arm.name), number)
            for metric in metrics
            if (number := Contrast(metric, arm.name).estimate(experiment.name, runs))
        ]
        rows.append([arm.label, rate, *numbers])
    return [*table(("method", "rate", *metrics), rows), "", setting_line(experiment, found)]


def setting_line(experiment: Experiment, runs: Runs) -> str:
    """Return the size of an experiment and what it can see."""
    units = next(iter(runs.values()))
    num_runs = sum(map(len, units.values()))
    size = f"{len(units)} units, {num_runs} runs of each method; "
    scale = experiment.scale
    if isinstance(scale, Search):
        return f"{size}at most {scale.num_questions} questions a unit."
    group = scale.generations // scale.prompts
    size += f"{scale.steps} steps of {scale.prompts} questions x {group} generations."
    return f"{size}  {power_words(experiment, runs)}"


def power_words(experiment: Experiment, runs: Runs) -> str:
    """Return how many units would see a difference of two points from GRPO, by the arms' spread."""
    reference = by_unit(runs, "grpo", "accuracy")
    needed = []
    for arm in experiment.arms:
        values = by_unit(runs, arm.name, "accuracy")
        spread = stdev(values[unit] - reference[unit] for unit in values)
        if spread > 0:
            needed.append(units_needed(spread, DIFFERENCE))
    return (
        f"To see a difference of 2 points from GRPO with 80 % power takes {min(needed)} to "
        f"{max(needed)} units, by method."
    )
