"""Results from parts: means over the seeds with intervals, and the comparison with GRPO."""

from collections.abc import Sequence
from statistics import fmean
from typing import Any

from benchmarks.methods.runs import DISCOVERY, PLANTED, Part
from benchmarks.methods.settings import METHODS, method_settings
from benchmarks.methods.statistics import bootstrap, interval, wilson

CURVES = ("accuracy", "sampled_accuracy", "length", "entropy", "leaks")
REFERENCE = "grpo"


def method_results(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return one method's mean curve and final accuracies, from one run for each seed."""
    curves = [run["curve"] for run in runs]
    looks = []
    for step in zip(*curves):
        low, high = interval([look["right"] for look in step])
        means = {name: fmean(look[name] for look in step) for name in CURVES}
        first = step[0]
        looks.append(
            {"step": first["step"], "generations": first["generations"], **means}
            | {"low": low, "high": high}
        )
    # each run is compared with its own best evaluation, not with that of the mean curve
    late = fmean(
        curve[-1]["accuracy"] - max(look["accuracy"] for look in curve) for curve in curves
    )
    return {
        "curve": looks,
        "late_change": late,
        "seconds": fmean(run["seconds"] for run in runs),
        "final_by_seed": [curve[-1]["accuracy"] for curve in curves],
    }


def generations_to(curve: Sequence[dict[str, Any]], accuracy: float) -> int | None:
    """Return the generations up to the first evaluation with this accuracy; None: there is none."""
    reached = (look["generations"] for look in curve if look["accuracy"] >= accuracy)
    return next(reached, None)


def planted_results(scores: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the means over the seeds, and each seed's precision, by kind of error and teacher."""
    results: dict[str, Any] = {}
    for kind, teachers in scores[0].items():
        results[kind] = {
            name: {
                "precision": fmean(score[kind][name]["precision"] for score in scores),
                "recall": fmean(score[kind][name]["recall"] for score in scores),
                "auroc": fmean(score[kind][name]["auroc"] for score in scores),
                "precision_by_seed": [score[kind][name]["precision"] for score in scores],
            }
            for name in teachers
        }
    return results


def discovery_results(runs: Sequence[dict[str, Any]], max_attempts: int) -> dict[str, Any]:
    """Return the share of all seeds' questions that are solved after 16, 32, ... attempts."""
    counts = [count for count in (16, 32, 64, 128, 256, 512) if count <= max_attempts]
    found: dict[str, Any] = {
        "attempts": counts,
        "num_questions": sum(len(run["questions"]) for run in runs),
    }
    for name in ("best of k", "self-distillation"):
        firsts = [first for run in runs for first in run[name]]
        successes = [sum(f is not None and f <= count for f in firsts) for count in counts]
        found[name] = {
            "probability": [right / len(firsts) for right in successes],
            "interval": [wilson(right, len(firsts)) for right in successes],
        }
    return found


def results(values: dict[Part, Any]) -> dict[str, Any]:
    """Put the parts of one experiment together."""
    by_method: dict[str, list[Any]] = {}
    settings_of: dict[str, Any] = {}
    for part, measured in values.items():
        by_method.setdefault(part.method, []).append(measured)
        if part.method in METHODS:
            settings_of[part.method] = {
                "label": METHODS[part.method].label,
                "learning_rate": part.rate,
                "settings": method_settings(part.task, part.method),
            }
    planted = by_method.pop(PLANTED, None)
    discovery = by_method.pop(DISCOVERY, None)
    methods = {
        name: {**settings_of[name], **method_results(runs)} for name, runs in by_method.items()
    }
    if REFERENCE in methods:
        goal = methods[REFERENCE]["curve"][-1]["accuracy"]
        ends = {
            name: [run["curve"][-1]["right"] for run in runs] for name, runs in by_method.items()
        }
        for name, method in methods.items():
            method["generations_to_reference"] = generations_to(method["curve"], goal)
            method["above_reference"] = {
                "mean": method["curve"][-1]["accuracy"] - goal,
                "interval": bootstrap(ends[name], ends[REFERENCE]),
            }
    found: dict[str, Any] = {"methods": methods}
    if planted:
        found["planted_errors"] = planted_results(planted)
    if discovery:
        most = max(part.search.max_attempts for part in values if part.method == DISCOVERY)
        found["discovery"] = discovery_results(discovery, most)
    return found
