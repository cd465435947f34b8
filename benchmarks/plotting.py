"""Figures in one style: dark on a solid page, since readers' pages are light or dark."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

INK, GREY, PAGE = "#1d1f23", "#62666d", "#ffffff"
STYLE: Any = {
    "figure.facecolor": PAGE,
    "axes.facecolor": PAGE,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": GREY,
    "xtick.color": GREY,
    "ytick.color": GREY,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "font.size": 10,
}
LINE = 1.25  # height of a line of text, in font sizes


class Name(NamedTuple):
    """A text to write at a point."""

    text: str
    x: float
    y: float
    color: str


@contextmanager
def figure_at(path: Path, columns: int, **shape: Any) -> Iterator[tuple[Any, Any]]:
    """Yield a figure and its axes, side by side; save it at the end."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    with pyplot.rc_context(STYLE):
        figure, axes = pyplot.subplots(1, columns, layout="constrained", **shape)
        yield figure, axes
        figure.savefig(path, dpi=150, metadata={"Software": None})
        pyplot.close(figure)


def write_names(axis: Any, names: Sequence[Name]) -> None:
    """Write names in a column right of the axis, each with a thin line to its point.

    Call this when the axis has its scales and all its data.
    """
    figure = axis.figure
    figure.draw_without_rendering()
    size = figure.get_size_inches()[1] * axis.get_position().height * 72  # in points
    to_share = axis.transData + axis.transAxes.inverted()
    placed = sorted((to_share.transform((name.x, name.y))[1], name) for name in names)
    heights = apart([height for height, _ in placed], LINE * STYLE["font.size"] / size)
    for height, (_, name) in zip(heights, placed):
        axis.annotate(
            name.text,
            (name.x, name.y),
            xytext=(1.02, height),
            textcoords="axes fraction",
            verticalalignment="center",
            color=name.color,
            arrowprops={"arrowstyle": "-", "color": GREY, "linestyle": ":", "shrinkA": 1},
        )


def apart(heights: Sequence[float], least: float) -> list[float]:
    """Move ascending heights until neighbours are ``least`` apart; groups keep their mean."""
    groups: list[tuple[float, int]] = []  # the mean and the number of heights that touch
    for height in heights:
        groups.append((height, 1))
        while len(groups) > 1:
            (below, count), (above, more) = groups[-2:]
            if above - below >= least * (count + more) / 2 - 1e-12:
                break
            both = count + more
            groups[-2:] = [((below * count + above * more) / both, both)]
    return [mean + least * (n - (count - 1) / 2) for mean, count in groups for n in range(count)]


def plain_logarithmic(axis: Any) -> None:
    """Put ticks with plain numbers at 1, 2 and 5 times the powers of ten."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
    axis.set_minor_formatter(NullFormatter())
