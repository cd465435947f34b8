"""Results as pictures: time and memory by tokens, time against error, and time by entropy."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.methods.figures import GREY, figure_at
from benchmarks.results_store import file_slug
from benchmarks.sparse_table import PART, times_4u
from fused_sd.bench.providers import PROVIDERS
from fused_sd.bench.table import US

NAMES = [provider.name for provider in PROVIDERS]
MARKERS = "os^vD<>phXP*"


def plots(found: dict[str, Any], folder: Path) -> list[str]:
    """Write a suite's pictures; returns their file names."""
    folder.mkdir(parents=True, exist_ok=True)
    slug = file_slug(found["environment"]["device"])
    names = []
    for kind, draw in (("scaling", scaling), ("plane", plane), ("entropy", by_entropy)):
        name = f"bench_{slug}_{kind}.png"
        if draw(found, folder / name):
            names.append(name)
    return names


def scaling(found: dict[str, Any], path: Path) -> bool:
    """Time and memory of the cells that differ in their tokens only; False: there are none."""
    chosen = _scaled(found)
    if len({cell["tokens"] for cell in chosen}) < 2:
        return False
    with figure_at(path, 1, 2, figsize=(10, 3.6)) as (figure, axes):
        _curves(axes[0], chosen, lambda row: row["times"]["p50"])
        _curves(axes[1], chosen, lambda row: row["peak_bytes"] / 2**20)
        floors = sorted((c["tokens"], c["floor"]["milliseconds"]) for c in chosen if c["floor"])
        axes[0].plot(*zip(*floors), color=GREY, ls="--", lw=1, label="bare GEMMs")
        title = f"{chosen[0]['objective']}, {chosen[0]['shape']}, forward and backward"
        axes[0].set_title(f"{title}, ms", fontsize=9, loc="left")
        axes[1].set_title("peak memory above the operands, MiB", fontsize=9, loc="left")
        handles, labels = axes[0].get_legend_handles_labels()
        figure.legend(
            handles, labels, loc="outside right center", frameon=False, labelcolor="linecolor"
        )
    return True


def plane(found: dict[str, Any], path: Path) -> bool:
    """Error of the gradient against time of one cell; False: nothing was timed."""
    cells = found["parts"].get("main", {}).values()
    cell = next((c for c in cells if any(row["times"] for row in c["rows"])), None)
    if cell is None:
        return False
    with figure_at(path, 1, 1, figsize=(6.5, 3.6)) as (figure, axis):
        for row in cell["rows"]:
            if row["times"] is None:
                continue
            x, y = row["times"]["p50"], 100 * row["errors"]["dhidden"]
            axis.scatter(x, y, label=row["provider"], **_style(row["provider"]))
        if cell["floor"]:
            axis.axvline(cell["floor"]["milliseconds"], color=GREY, ls="--", lw=1)
        axis.set_xscale("log")
        axis.set_yscale("log")
        axis.set_xlabel("ms; dashed: the bare GEMMs")
        title = f"{cell['objective']}, {cell['shape']}, {cell['tokens']} tokens: error of dH, %"
        axis.set_title(title, fontsize=9, loc="left")
        axis.grid(alpha=0.25)
        figure.legend(loc="outside right center", frameon=False, fontsize=8)
    return True


def by_entropy(found: dict[str, Any], path: Path) -> bool:
    """Time over four GEMMs of a KL, by the student's entropy; False: there are not two."""
    cells = [c for c in found["parts"].get(PART, {}).values() if c["objective"] == "reverse_kl"]
    timed = sorted((c for c in cells if c["floor"]), key=lambda cell: cell["entropy"])
    if len(timed) < 2:
        return False
    with figure_at(path, 1, 1, figsize=(6.5, 3.6)) as (figure, axis):
        for name in NAMES:
            points = [
                (cell["entropy"], times_4u(cell, row))
                for cell in timed
                for row in cell["rows"]
                if row["provider"] == name and row["times"]
            ]
            if points:
                style = _style(name)
                axis.plot(*zip(*points), marker=style["marker"], color=style["color"], label=name)
        axis.axhline(1, color=GREY, ls="--", lw=1)
        axis.set_xlabel("mean entropy of the student, nat")
        title = f"reverse_kl, {timed[0]['shape']}, {timed[0]['tokens']} tokens"
        axis.set_title(f"{title}: time over that of four GEMMs", fontsize=9, loc="left")
        axis.grid(alpha=0.25)
        figure.legend(loc="outside right center", frameon=False, fontsize=8)
    return True


def _scaled(found: dict[str, Any]) -> list[dict[str, Any]]:
    """The cells of the part "scaling", and those of others that fit in between."""

    def fixed(cell: dict[str, Any]) -> tuple[Any, ...]:
        names = ("objective", "shape", "dtype", "trainable")
        return (*(cell[name] for name in names), cell["counted"] == cell["tokens"])

    kinds = {fixed(cell) for cell in found["parts"].get("scaling", {}).values()}
    cells = [cell for part in found["parts"].values() for cell in part.values()]
    timed = (c for c in cells if fixed(c) in kinds and any(row["times"] for row in c["rows"]))
    return sorted(timed, key=lambda cell: cell["tokens"])


def _curves(
    axis: Any, cells: list[dict[str, Any]], value: Callable[[dict[str, Any]], float]
) -> None:
    """One line for each provider with at least two points; it ends where memory does."""
    for name in NAMES:
        points = [
            (cell["tokens"], value(row))
            for cell in cells
            for row in cell["rows"]
            if row["provider"] == name and row["times"]
        ]
        if len(points) > 1:
            style = _style(name)
            axis.plot(*zip(*points), marker=style["marker"], color=style["color"], label=name)
    tokens = sorted({cell["tokens"] for cell in cells})
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    axis.set_xticks(tokens, [str(count) for count in tokens])
    axis.set_xlabel("tokens")
    axis.grid(alpha=0.25)


def _style(name: str) -> dict[str, Any]:
    """The same for a provider in every picture; ours stands out."""
    index = NAMES.index(name) if name in NAMES else len(NAMES)
    size = 90 if name == US else 36
    return {"color": f"C{index % 10}", "marker": MARKERS[index % len(MARKERS)], "s": size}
