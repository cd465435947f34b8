"""The results as Markdown tables."""

from collections.abc import Sequence
from typing import Any

from benchmarks.markdown import environment_line, table
from benchmarks.methods.settings import METHODS

COLUMNS = (
    "method",
    "held-out accuracy",
    "95 % interval",
    "above GRPO",
    "generations to GRPO's end",
    "length",
    "entropy",
    "leaks",
    "end - best",
)


def markdown_lines(results: dict[str, Any]) -> list[str]:
    """Return the tables of methods (best last), planted errors and discovery, and the settings."""
    methods = sorted(results["methods"].values(), key=lambda m: m["curve"][-1]["accuracy"])
    rows = [base_row(methods[0]["curve"][0]), *map(method_row, methods)]
    lines = [*table(COLUMNS, rows), ""]
    if "planted_errors" in results:
        lines += [*planted_lines(results["planted_errors"]), ""]
    if "discovery" in results:
        lines += [*discovery_lines(results["discovery"]), ""]
    return [*lines, setting_line(results)]


def base_row(first: dict[str, Any]) -> list[str]:
    """Return the base model's row, from any method's first evaluation."""
    length, entropy = f"{first['length']:.1f}", f"{first['entropy']:.2f}"
    return ["base", *_accuracy(first), "", "", length, entropy, _percent(first["leaks"]), ""]


def method_row(method: dict[str, Any]) -> list[str]:
    first, last = method["curve"][0], method["curve"][-1]
    reached = method.get("generations_to_reference")
    return [
        method["label"],
        *_accuracy(last),
        _above_grpo(method),
        "not reached" if reached is None else f"{reached}",
        f"{last['length']:.1f}",
        f"{first['entropy']:.2f} -> {last['entropy']:.2f}",
        _percent(last["leaks"]),
        f"{100 * method['late_change']:+.1f}",
    ]


def _above_grpo(method: dict[str, Any]) -> str:
    """Return the difference from GRPO's final accuracy with its interval; "" for GRPO itself."""
    above = method.get("above_reference")
    if above is None or method["label"] == METHODS["grpo"].label:
        return ""
    low, high = above["interval"]
    return f"{100 * above['mean']:+.1f} ({100 * low:+.1f} to {100 * high:+.1f})"


def _accuracy(look: dict[str, Any]) -> tuple[str, str]:
    return _percent(look["accuracy"]), f"{100 * look['low']:.1f} - {100 * look['high']:.1f}"


def planted_lines(planted: dict[str, Any]) -> list[str]:
    """Return how often the most blamed token is the planted error, and the area under the ROC."""
    kinds = list(planted)
    rows = []
    for teacher in planted[kinds[0]]:
        scores = [planted[kind][teacher] for kind in kinds]
        pairs = [(_percent(score["precision"]), f"{score['auroc']:.2f}") for score in scores]
        rows.append([teacher, *(cell for pair in pairs for cell in pair)])
    headings = [f"{kind}: {name}" for kind in kinds for name in ("found", "AUROC")]
    return table(["blame by", *headings], rows)


def discovery_lines(discovery: dict[str, Any]) -> list[str]:
    """Return the share of hard questions that are solved after each number of attempts."""
    headings = [f"{discovery['num_questions']} hard questions", *map(str, discovery["attempts"])]
    ways = ("best of k", "self-distillation")
    return table(headings, [[way, *map(_percent, discovery[way]["probability"])] for way in ways])


def setting_line(results: dict[str, Any]) -> str:
    scale, seeds = results["scale"], results["seeds"]
    last = next(iter(results["methods"].values()))["curve"][-1]
    return (
        f"Model {results['model']}, {_count(seeds, 'seed')}; "
        f"{scale['prompts']} questions x {scale['generations_per_question']} generations a step, "
        f"{last['generations']} generations in all; greedy accuracy on {results['num_questions']} "
        f"held-out questions.  {environment_line(results['environment'])}."
    )


def _count(things: Sequence[Any], name: str) -> str:
    return f"{len(things)} {name}{'s' if len(things) > 1 else ''}"


def _percent(value: float) -> str:
    return f"{100 * value:.1f} %"
