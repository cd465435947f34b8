"""``report.md``: the results of both experiments as tables."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.markdown import environment_line, table

LABELS = {
    "held-out accuracy": "accuracy",
    "held-out KL": "KL(teacher, student)",
    "held-out entropy": "entropy, nat",
}


def write(folder: Path) -> Path:
    """Write the report on the results in a folder; return its path."""
    lines = ["# Dense against certified sparse gradients", ""]
    for name, section in (("online", online_lines), ("replay", replay_lines)):
        source = folder / f"{name}.json"
        if source.exists():
            results = json.loads(source.read_text(encoding="utf-8"))
            seeds = ", ".join(map(str, results["seeds"]))
            where = environment_line(results["environment"])
            lines += [*section(results), "", f"Seeds {seeds}; {where}.", ""]
    page = folder / "report.md"
    page.write_text("\n".join(lines), encoding="utf-8")
    return page


def online_lines(results: dict[str, Any]) -> list[str]:
    """Return every evaluation of the sparse arm beside the dense one, and the certificates."""
    settings, compared = results["settings"], results["compared"]
    batch = settings["prompts_per_step"] * settings["generations_per_prompt"]
    headings = ("arm", "curve", "step", "dense", "sparse", "spread", "difference", "paired spread")
    names = ("dense", "other", "spread", "difference", "paired_spread", "distance")
    rows = [
        [arm, LABELS[curve], str(look["step"]), *(f"{look[name]:.3f}" for name in names)]
        for arm, values in compared.items()
        for curve, looks in values["curves"].items()
        for look in looks
    ]
    return [
        "## The demo's task, on-policy",
        "",
        f"SmolLM2-135M-Instruct with an adapter, {settings['steps']} steps of {batch} responses, "
        "KL(teacher, student) over all 49152 tokens at temperature 0.6.  Spread: standard "
        "deviation over the dense seeds.  Distance: the difference of the means, in standard "
        "errors of the difference between two sets of dense seeds.",
        "",
        *table((*headings, "distance"), rows, texts=2),
        "",
        *certificate_lines(compared),
        "",
        *(verdict(arm, values["curves"], results["seeds"]) for arm, values in compared.items()),
    ]


def verdict(arm: str, curves: dict[str, Any], seeds: Sequence[int]) -> str:
    """Return a sentence on how many differences are within the dense seeds' spread."""
    looks = [look for curve in curves.values() for look in curve if look["spread"]]
    worst = max(abs(look["distance"]) for look in looks)
    inside = sum(abs(look["difference"]) <= look["spread"] for look in looks)
    return (
        f"{arm}: {inside} of {len(looks)} differences are within the spread of the dense seeds, "
        f"the largest distance is {worst:.2f}.  {paired_verdict(curves, len(seeds))}"
    )


def paired_verdict(curves: dict[str, Any], num_seeds: int) -> str:
    """Return a sentence on the evaluation that differs most from the dense arm, seed by seed."""
    sizes = {
        (LABELS[curve], look["step"]): look["difference"] / look["paired_spread"] * num_seeds**0.5
        for curve, looks in curves.items()
        for look in looks
        if look["paired_spread"]
    }
    if not sizes:
        return "Paired by seed, no difference has a spread."
    (curve, step), size = max(sizes.items(), key=lambda item: abs(item[1]))
    return (
        f"Paired by seed, {len(sizes)} differences have a spread; the largest is {size:+.1f} of "
        f"its standard errors ({curve}, step {step})."
    )


def certificate_lines(compared: dict[str, Any]) -> list[str]:
    headings = ("arm", "tokens", "dense rows", "entries of the others", "dropped, mean")
    rows = [
        [
            arm,
            f"{values['certificates']['tokens']:.0f}",
            f"{values['certificates']['dense_share']:.1%}",
            f"{values['certificates']['entries']:.0f}",
            f"{values['certificates']['dropped']:.5f}",
            f"{values['certificates']['largest_dropped']:.5f}",
        ]
        for arm, values in compared.items()
    ]
    return table((*headings, "dropped, largest"), rows)


def replay_lines(results: dict[str, Any]) -> list[str]:
    """Return the distances of each arm from the dense one."""
    scale = results["scale"]
    headings = ("arm", "loss gap", "held-out loss gap", "KL from dense", "weights", "head")
    rows = []
    for arm, values in results["compared"].items():
        has_gap = "loss gap" in values  # another draw has other losses
        rows.append(
            [
                arm,
                f"{values['loss gap']:.2g}" if has_gap else "",
                f"{values['held-out gap']:.2g}",
                f"{values['KL from dense']:.2g}",
                f"{values['distance']:.3f}",
                f"{values['head distance']:.3f}",
                f"{values['dense_share']:.1%}" if has_gap else "",
                f"{values['entries']:.0f}" if has_gap else "",
                f"{values['largest_dropped']:.5f}" if has_gap else "",
            ]
        )
    return [
        "## The same responses, the whole model",
        "",
        f"SmolLM2-135M-Instruct, all weights with the tied head, AdamW {scale['learning_rate']:g}, "
        f"{scale['steps']} steps of {scale['words']} responses; SDPO's default loss, top 100 and "
        "tail, at temperature 0.6.  Distances of weights and head are shares of the distance that "
        "the dense arm moved.  AdamW moves a weight by a whole step however small its gradient is: "
        "weights may differ where losses and distributions do not.",
        "",
        *table((*headings, "dense rows", "entries", "dropped, largest"), rows),
    ]
