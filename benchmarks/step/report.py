"""Tables and verdicts from the results of ``benchmarks.step``."""

from collections.abc import Iterator
from typing import Any

from benchmarks.markdown import environment_line, table
from benchmarks.step.providers import PROVIDERS

GIB = 2**30
TOKENS_TARGET = 2.0  # times the longest batch that TRL fits into memory
NOT_SLOWER = "never slower at any length"


def markdown(document: dict[str, Any]) -> str:
    """Return a document of ``Results`` as a section: a table for each model, and the targets."""
    settings, lanes = document["settings"], document["lanes"]
    lengths = [str(length) for length in settings["lengths"]]
    parts = [
        "## One SDPO training step",
        _explanation(settings),
    ]
    for model in dict.fromkeys(name.split("/")[0] for name in lanes):
        rows = [
            _row(PROVIDERS[name].title, lanes[f"{model}/{name}"], lengths)
            for name in PROVIDERS
            if f"{model}/{name}" in lanes
        ]
        columns = [f"{int(length):,} tokens" for length in lengths]
        head = ["", *columns, "longest", "loss error", "gradient error"]
        lines = table(head, rows, texts=len(head))
        parts.append("\n".join([f"### {model}", "", *lines]))
    parts.append("### Targets\n\n" + "\n".join(f"* {line}" for line in verdicts(document)))
    facts = {"device": settings["device"], **document["environment"]}
    return "\n\n".join([*parts, f"{environment_line(facts)}."]) + "\n"


def verdicts(document: dict[str, Any]) -> list[str]:
    """Return a line for each model and pair of trainers: is ours as fast, and does twice fit?"""
    lines = []
    for model, theirs, ours in _pairs(document["lanes"]):
        against = f"{model}, {PROVIDERS[ours].title} against {PROVIDERS[theirs].title}"
        pair = [document["lanes"][f"{model}/{name}"] for name in (theirs, ours)]
        lines.append(f"{against}: {_not_slower(*pair)}; {_twice_the_tokens(*pair)}")
    return lines or ["nothing to compare yet"]


def _pairs(lanes: dict[str, Any]) -> Iterator[tuple[str, str, str]]:
    """Yield model, TRL's and our provider for every objective that both have results of."""
    for model in dict.fromkeys(name.split("/")[0] for name in lanes):
        for theirs in PROVIDERS.values():
            for ours in PROVIDERS.values():
                same = ours.objective == theirs.objective and ours.ours and not theirs.ours
                if same and {f"{model}/{theirs.name}", f"{model}/{ours.name}"} <= lanes.keys():
                    yield model, theirs.name, ours.name


def _not_slower(theirs: dict[str, Any], ours: dict[str, Any]) -> str:
    ratios = {
        int(length): cell["seconds"]["p50"] / ours["cells"][length]["seconds"]["p50"]
        for length, cell in theirs["cells"].items()
        if _measured(cell) and _measured(ours["cells"].get(length))
    }
    if not ratios:
        return f"{NOT_SLOWER}: not measured"
    slower = [f"{length:,}" for length, ratio in ratios.items() if ratio < 1]
    said = ", ".join(f"{ratio:.2f} x at {length:,}" for length, ratio in sorted(ratios.items()))
    verdict = f"MISSED at {', '.join(slower)}" if slower else "met"
    return f"{NOT_SLOWER}: {verdict} (speed {said})"


def _twice_the_tokens(theirs: dict[str, Any], ours: dict[str, Any]) -> str:
    target = f"{TOKENS_TARGET:g} x the tokens"
    stock, fused = theirs.get("longest"), ours.get("longest")
    if stock is None or fused is None or not stock["fits"]:
        return f"{target}: not measured"
    if stock["fails"] is None:
        return f"{target}: not decided, TRL's still fits at {stock['fits']:,}"
    # a lower bound: TRL's longest batch is shorter than the length that failed
    ratio = fused["fits"] / stock["fails"]
    if ratio >= TOKENS_TARGET:
        return f"{target}: met (at least {ratio:.1f} x)"
    if fused["fails"] is None:
        return f"{target}: not decided, at least {ratio:.1f} x, ours still fits"
    most = fused["fails"] / stock["fits"]
    verdict = "MISSED" if most < TOKENS_TARGET else "not decided"
    return f"{target}: {verdict} ({ratio:.1f} to {most:.1f} x)"


def _measured(cell: dict[str, Any] | None) -> bool:
    return cell is not None and cell["outcome"] == "measured"


def _row(title: str, lane: dict[str, Any], lengths: list[str]) -> list[str]:
    outcomes = [key for key in ("wrong", "failed", "left_out") if key in lane]
    reason = "".join(f" ({key.replace('_', ' ')}: {lane[key]})" for key in outcomes)
    cells = [_cell(lane["cells"].get(length)) for length in lengths]
    found = lane.get("agreement")
    errors = (
        ["", ""]
        if found is None
        else [f"{found[f'{of}_error']:.1e}" for of in ("loss", "gradient")]
    )
    return [title + reason, *cells, _longest(lane), *errors]


def _cell(cell: dict[str, Any] | None) -> str:
    if cell is None:
        return "not run"
    if not _measured(cell):
        return str(cell["outcome"])
    low, middle, high = (cell["seconds"][name] for name in ("p20", "p50", "p80"))
    return f"{middle:.2f} s ({low:.2f}-{high:.2f}), {cell['peak_bytes'] / GIB:.2f} GiB"


def _longest(lane: dict[str, Any]) -> str:
    bracket = lane.get("longest")
    if bracket is None:
        return ""
    if bracket["fails"] is None:
        return f"at least {bracket['fits']:,}"
    return f"{bracket['fits']:,} (not {bracket['fails']:,})"


def _explanation(settings: dict[str, Any]) -> str:
    limit = settings["memory_limit"]
    memory = "" if limit is None else f"  No step may hold more than {limit / GIB:.2f} GiB."
    return (
        f"The trainers' own `train()` on {settings['device']}, {settings['dtype']} random weights "
        "and AdamW states, activation checkpointing, sdpa attention, responses of up to "
        f"{settings['row_tokens']:,} tokens in one batch.  The teacher is the student after 512 "
        f"tokens of feedback.  Cells: median of {settings['steps']} steps (20th to 80th "
        "percentile), and the most memory held at once, weights and optimizer included.  Longest: "
        "the longest batch that fits, in response tokens.  Errors: loss and gradient against "
        f"float64 logits of the same hidden states.{memory}"
    )
