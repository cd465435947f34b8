"""Results as a Markdown page and a figure."""

import json
from pathlib import Path
from typing import Any

from benchmarks.methods.figures import GREY, figure_at
from benchmarks.sparse.arms import DENSE

LABELS = {
    "held-out accuracy": "accuracy",
    "held-out KL": "KL(teacher, student)",
    "held-out entropy": "entropy, nat",
}


def write(folder: Path) -> list[Path]:
    """``report.md`` and ``curves.png`` of what lies in the folder."""
    pages, paths = ["# Dense against certified sparse gradients", ""], []
    for name, lines in (("online", online_lines), ("replay", replay_lines)):
        source = folder / f"{name}.json"
        if source.exists():
            found = json.loads(source.read_text(encoding="utf-8"))
            pages += [*lines(found), *environment_lines(found), ""]
            if name == "online":
                paths.append(folder / "curves.png")
                curves(found, paths[-1])
    page = folder / "report.md"
    page.write_text("\n".join(pages), encoding="utf-8")
    return [page, *paths]


def environment_lines(found: dict[str, Any]) -> list[str]:
    facts = ", ".join(f"{name} {value}" for name, value in found["environment"].items())
    return [f"Seeds {', '.join(map(str, found['seeds']))}; {facts}."]


def online_lines(found: dict[str, Any]) -> list[str]:
    """Every look of every arm, and each arm's certificates."""
    settings = found["settings"]
    batch = settings["prompts_per_step"] * settings["generations_per_prompt"]
    lines = [
        "## The demo's task, on-policy",
        "",
        f"SmolLM2-135M-Instruct with an adapter, {settings['steps']} steps of {batch} responses, "
        "KL(teacher, student) over all 49152 tokens at temperature 0.6.  Spread: standard "
        "deviation of the dense seeds.  Distance: difference of the means by the standard error "
        "that two sets of dense seeds would have.",
        "",
        "| arm | curve | step | dense | sparse | spread | difference | paired spread | distance |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for arm, compared in found["compared"].items():
        for curve, looks in compared["curves"].items():
            for look in looks:
                names = ("dense", "other", "spread", "difference", "paired_spread", "distance")
                cells = [f"{look[name]:.3f}" for name in names]
                lines.append(f"| {arm} | {LABELS[curve]} | {look['step']} | {' | '.join(cells)} |")
    lines += ["", *certificate_lines(found["compared"]), ""]
    for arm, compared in found["compared"].items():
        looks = [look for curve in compared["curves"].values() for look in curve if look["spread"]]
        worst = max(abs(look["distance"]) for look in looks)
        inside = sum(abs(look["difference"]) <= look["spread"] for look in looks)
        lines.append(
            f"{arm}: {inside} of {len(looks)} differences are within the spread of the dense "
            f"seeds, the largest distance is {worst:.2f}.  {paired_line(found, arm)}"
        )
    return [*lines, ""]


def paired_line(found: dict[str, Any], arm: str) -> str:
    """The look whose difference stands out most from its own spread over the seeds."""
    count = len(found["seeds"])
    sizes = {
        (LABELS[curve], look["step"]): look["difference"] / look["paired_spread"] * count**0.5
        for curve, looks in found["compared"][arm]["curves"].items()
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
    lines = [
        "| arm | tokens | dense rows | entries of the others | dropped, mean | dropped, largest |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for arm, values in compared.items():
        said = values["certificates"]
        lines.append(
            f"| {arm} | {said['tokens']:.0f} | {said['dense_share']:.1%} | {said['entries']:.0f} "
            f"| {said['dropped']:.5f} | {said['largest_dropped']:.5f} |"
        )
    return lines


def replay_lines(found: dict[str, Any]) -> list[str]:
    """Distances of each arm from the dense one."""
    scale = found["scale"]
    lines = [
        "## The same responses, the whole model",
        "",
        f"SmolLM2-135M-Instruct, all weights with the tied head, AdamW {scale['learning_rate']:g}, "
        f"{scale['steps']} steps of {scale['words']} responses; SDPO's default loss, top 100 and "
        "tail, at temperature 0.6.  Distances are shares of the dense arm's way.  AdamW moves a "
        "weight by a whole step however small its gradient is: weights may differ where losses "
        "and distributions do not.",
        "",
        "| arm | loss gap | held-out loss gap | KL from dense | weights | head | dense rows "
        "| entries | dropped, largest |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for arm, row in found["compared"].items():
        cells = [f"{row['held-out gap']:.2g}", f"{row['KL from dense']:.2g}"]
        cells += [f"{row['distance']:.3f}", f"{row['head distance']:.3f}"]
        if "loss gap" in row:
            cells.insert(0, f"{row['loss gap']:.2g}")
            cells += [f"{row['dense_share']:.1%}", f"{row['entries']:.0f}"]
            cells.append(f"{row['largest_dropped']:.5f}")
        else:
            cells = ["", *cells, "", "", ""]
        lines.append(f"| {arm} | {' | '.join(cells)} |")
    return [*lines, ""]


def curves(found: dict[str, Any], path: Path) -> None:
    """All seeds thin, means thick, an arm a colour; and the certificates by step."""
    colours = {name: f"C{place}" for place, name in enumerate(found["runs"])}
    with figure_at(path, 1, len(LABELS) + 1, figsize=(13, 3.2)) as (figure, axes):
        for axis, (curve, label) in zip(axes, LABELS.items()):
            for arm, runs in found["runs"].items():
                points = [run["curves"][curve] for run in runs]
                for point in points:
                    axis.plot(*zip(*point), color=colours[arm], alpha=0.35, lw=0.7)
                steps = [step for step, _ in points[0]]
                means = [sum(v for _, v in look) / len(look) for look in zip(*points)]
                axis.plot(steps, means, color=colours[arm], label=arm, lw=1.8)
            axis.set_title(f"held-out {label}", fontsize=9, loc="left")
        for arm, runs in found["runs"].items():
            if arm != DENSE.name:
                shares = [
                    sum(s["dense"] for s in step) / sum(s["tokens"] for s in step)
                    for step in zip(*(run["steps"] for run in runs))
                ]
                places = range(1, len(shares) + 1)
                axes[-1].plot(places, shares, color=colours[arm], lw=1.2)
        axes[-1].set_title("share of dense rows", fontsize=9, loc="left")
        axes[-1].set_ylim(0, 1)
        for axis in axes:
            axis.set_xlabel("step", color=GREY)
            axis.grid(alpha=0.25)
        figure.legend(
            *axes[0].get_legend_handles_labels(),
            loc="outside right center",
            frameon=False,
            labelcolor="linecolor",
            fontsize=9,
        )
