"""Results as Markdown tables, and in the README."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.methods.settings import METHODS
from fused_sd import checks

END = "<!-- end -->"
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


def share(value: float) -> str:
    return f"{100 * value:.1f} %"


def above(method: dict[str, Any]) -> str:
    """How far a method ends above GRPO, and the interval of it; GRPO itself does not."""
    found = method.get("above_reference")
    if found is None or method["label"] == METHODS["grpo"].label:
        return ""
    low, high = found["interval"]
    return f"{100 * found['mean']:+.1f} ({100 * low:+.1f} to {100 * high:+.1f})"


def row(method: dict[str, Any]) -> list[str]:
    """A method's row of the table."""
    first, last = method["curve"][0], method["curve"][-1]
    reached = method.get("generations_to_reference")
    return [
        method["label"],
        share(last["accuracy"]),
        f"{100 * last['low']:.1f} - {100 * last['high']:.1f}",
        above(method),
        "not reached" if reached is None else f"{reached}",
        f"{last['length']:.1f}",
        f"{first['entropy']:.2f} -> {last['entropy']:.2f}",
        share(last["leaks"]),
        f"{100 * method['late_change']:+.1f}",
    ]


def base_row(method: dict[str, Any]) -> list[str]:
    """The base model: the first look of any method."""
    look = method["curve"][0]
    return [
        "base",
        share(look["accuracy"]),
        f"{100 * look['low']:.1f} - {100 * look['high']:.1f}",
        "",
        "",
        f"{look['length']:.1f}",
        f"{look['entropy']:.2f}",
        share(look["leaks"]),
        "",
    ]


def markdown_lines(found: dict[str, Any]) -> list[str]:
    """Table of the methods, best last; table of the planted errors; how it was measured."""
    methods = sorted(found["methods"].values(), key=lambda m: m["curve"][-1]["accuracy"])
    rows = [base_row(methods[0]), *map(row, methods)]
    lines = [_line(COLUMNS), _ruler(len(COLUMNS)), *map(_line, rows), ""]
    if "planted_errors" in found:
        lines += [*planted_lines(found["planted_errors"]), ""]
    if "discovery" in found:
        lines += [*discovery_lines(found["discovery"]), ""]
    return [*lines, *setting_lines(found)]


def planted_lines(planted: dict[str, Any]) -> list[str]:
    """How often the most blamed token is the planted error, and the area under the ROC curve."""
    kinds = list(planted)
    header = ["blame by", *(f"{kind}: {name}" for kind in kinds for name in ("found", "AUROC"))]
    lines = [_line(header), _ruler(len(header))]
    for teacher in planted[kinds[0]]:
        scores = [planted[kind][teacher] for kind in kinds]
        pairs = [(share(score["precision"]), f"{score['auroc']:.2f}") for score in scores]
        lines.append(_line([teacher, *(cell for pair in pairs for cell in pair)]))
    return lines


def discovery_lines(discovery: dict[str, Any]) -> list[str]:
    """Hard questions solved after so many attempts."""
    counts = discovery["attempts"]
    header = [f"{discovery['num_questions']} hard questions", *map(str, counts)]
    lines = [_line(header), _ruler(len(header))]
    for name in ("best of k", "self-distillation"):
        lines.append(_line([name, *map(share, discovery[name]["probability"])]))
    return lines


def setting_lines(found: dict[str, Any]) -> list[str]:
    """What was run, where."""
    scale, where = found["scale"], found["environment"]
    count = len(found["seeds"])
    last = next(iter(found["methods"].values()))["curve"][-1]
    versions = ", ".join(f"{name} {where[name]}" for name in ("torch", "transformers", "trl"))
    return [
        f"Model {found['model']}, {count} seed{'s' if count > 1 else ''}; "
        f"{scale['prompts']} questions x {scale['generations_per_question']} generations a step, "
        f"{last['generations']} generations in all; greedy accuracy on {found['num_questions']} "
        f"held-out questions.  {where['device']}; {versions}; commit {where['commit']}."
    ]


def update_readme(path: Path, lines: Sequence[str], model: str) -> None:
    """Put the lines between the README's marker of the model and its end."""
    match = _block(path, model)
    if match is not None:
        text = match.string
        body = "\n\n" + "\n".join(lines) + "\n\n"
        path.write_text(text[: match.start(1)] + body + text[match.end(1) :])


def check_readme(path: Path, model: str) -> None:
    """The file has a place for the model's table."""
    if _block(path, model) is None:
        checks.fail(
            "--update-readme",
            f"name a file with a line '<!-- methods {model}: ... -->' and a line {END!r} below it",
            repr(str(path)),
            "add the two lines where the table belongs",
        )


def _block(path: Path, model: str) -> re.Match[str] | None:
    """What stands between the marker's line and the end's."""
    text = path.read_text() if path.is_file() else ""
    return re.search(f"<!-- methods {model}:[^\n]*(\n.*?){re.escape(END)}", text, re.DOTALL)


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _ruler(columns: int) -> str:
    return _line(["---", *["---:"] * (columns - 1)])
