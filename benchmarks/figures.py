"""Plots of a suite's results: time and memory by tokens, error by time, and time by entropy."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.plotting import GREY, INK, Name, figure_at, plain_logarithmic, write_names
from benchmarks.sparse_table import PART, times_4u
from benchmarks.storage import file_slug
from fused_sd.bench.providers import PROVIDERS
from fused_sd.bench.providers.eager import EAGER
from fused_sd.bench.table import US, is_ours

NAMES = [provider.name for provider in PROVIDERS]
MARKERS = "os^vD<>phXP*"
BLUE = "#1f6fc4"
Cell = dict[str, Any]
Row = dict[str, Any]


def plots(results: dict[str, Any], folder: Path) -> list[str]:
    """Write the plots that a suite's results suffice for; return their file names."""
    folder.mkdir(parents=True, exist_ok=True)
    slug = file_slug(results["environment"]["device"])
    names = []
    for kind, draw in (("scaling", scaling), ("plane", plane), ("entropy", by_entropy)):
        name = f"bench_{slug}_{kind}.png"
        if draw(results["parts"], folder / name):
            names.append(name)
    return names


def scaling(parts: dict[str, Any], path: Path) -> bool:
    """Plot time and memory by tokens; return False if only one number of tokens was measured."""
    cells = _scaled(parts)
    if len({cell["tokens"] for cell in cells}) < 2:
        return False
    tokens = sorted({cell["tokens"] for cell in cells})
    with figure_at(path, 2, figsize=(10, 3.8)) as (_, axes):
        for axis in axes:
            axis.set_xscale("log", base=2)
            axis.set_yscale("log")
            axis.set_xticks(tokens, [str(count) for count in tokens])
            axis.set_xlabel("tokens")
            plain_logarithmic(axis.yaxis)
        title = f"{cells[0]['objective']}, {cells[0]['shape']}, forward and backward"
        _title(axes[0], f"{title}, ms")
        _title(axes[1], "peak memory above the operands, MiB")
        times = _curves(axes[0], cells, "tokens", lambda _, row: row["times"]["p50"])
        memory = _curves(axes[1], cells, "tokens", lambda _, row: row["peak_bytes"] / 2**20)
        floors = sorted((c["tokens"], c["floor"]["milliseconds"]) for c in cells if c["floor"])
        axes[0].plot(*zip(*floors), color=GREY, ls="--", lw=1)
        write_names(axes[0], [*times, Name("bare GEMMs", *floors[-1], GREY)])
        write_names(axes[1], memory)
    return True


def plane(parts: dict[str, Any], path: Path) -> bool:
    """Plot the gradient's error by time for the first timed cell; return False without one."""
    cells = parts.get("main", {}).values()
    cell = next((c for c in cells if any(row["times"] for row in c["rows"])), None)
    if cell is None:
        return False
    with figure_at(path, 1, figsize=(7, 3.8)) as (_, axis):
        axis.set_xscale("log")
        axis.set_yscale("log")
        plain_logarithmic(axis.xaxis)
        plain_logarithmic(axis.yaxis)
        names = []
        for row in cell["rows"]:
            if row["times"] is None:
                continue
            x, y = row["times"]["p50"], 100 * row["errors"]["dhidden"]
            style = _style(row["provider"])
            axis.scatter(x, y, s=60, color=style["color"], marker=style["marker"])
            names.append(Name(row["provider"], x, y, style["color"]))
        axis.margins(y=0.15)
        axis.set_xlabel("ms; dashed: the bare GEMMs")
        problem = f"{cell['objective']}, {cell['shape']}, {cell['tokens']} tokens"
        _title(axis, f"{problem}: error of dH, %")
        if cell["floor"]:
            axis.axvline(cell["floor"]["milliseconds"], color=GREY, ls="--", lw=1)
        write_names(axis, names)
    return True


def by_entropy(parts: dict[str, Any], path: Path) -> bool:
    """Plot a KL's time over four GEMMs by the student's entropy; return False below two cells."""
    cells = [c for c in parts.get(PART, {}).values() if c["objective"] == "reverse_kl"]
    timed = sorted((c for c in cells if c["floor"]), key=lambda cell: cell["entropy"])
    if len(timed) < 2:
        return False
    with figure_at(path, 1, figsize=(7, 3.8)) as (_, axis):
        names = _curves(axis, timed, "entropy", times_4u, least_points=1)
        axis.axhline(1, color=GREY, ls="--", lw=1)
        axis.set_ylim(bottom=0)
        axis.set_xlabel("mean entropy of the student, nat")
        problem = f"reverse_kl, {timed[0]['shape']}, {timed[0]['tokens']} tokens"
        _title(axis, f"{problem}: time over that of four GEMMs")
        write_names(axis, [*names, Name("four GEMMs", timed[-1]["entropy"], 1, GREY)])
    return True


def _scaled(parts: dict[str, Any]) -> list[Cell]:
    """Return the timed cells that differ from those of the part "scaling" in their tokens alone."""

    def fixed(cell: Cell) -> tuple[Any, ...]:
        names = ("objective", "shape", "dtype", "trainable")
        return (*(cell[name] for name in names), cell["counted"] == cell["tokens"])

    kinds = {fixed(cell) for cell in parts.get("scaling", {}).values()}
    cells = [cell for part in parts.values() for cell in part.values()]
    timed = (c for c in cells if fixed(c) in kinds and any(row["times"] for row in c["rows"]))
    return sorted(timed, key=lambda cell: cell["tokens"])


def _curves(
    axis: Any,
    cells: Sequence[Cell],
    x: str,
    y: Callable[[Cell, Row], float | None],
    least_points: int = 2,
) -> list[Name]:
    """Draw one line for each provider, to where it runs out of memory; return the ends' names."""
    names = []
    for name in NAMES:
        points = [
            (cell[x], y(cell, row))
            for cell in cells
            for row in cell["rows"]
            if row["provider"] == name and row["times"]
        ]
        if len(points) >= least_points:
            style = _style(name)
            axis.plot(*zip(*points), **style)
            names.append(Name(name, *points[-1], style["color"]))
    return names


def _title(axis: Any, text: str) -> None:
    axis.set_title(text, fontsize=10, loc="left")
    axis.grid(alpha=0.25)


def _style(name: str) -> dict[str, Any]:
    """Return a provider's colour and marker, the same in every plot.

    This library is blue, dashed where gradients are sparse, and eager PyTorch black.  All others
    are grey: their names stand at their lines, and twenty colours could not be told apart.
    """
    marker = MARKERS[NAMES.index(name) % len(MARKERS)] if name in NAMES else "o"
    color = BLUE if is_ours(name) else INK if name == EAGER.name else GREY
    width, dash = (2.2 if name == US else 1.4), ("--" if is_ours(name) and name != US else "-")
    return {"color": color, "marker": marker, "linewidth": width, "linestyle": dash}
