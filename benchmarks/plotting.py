"""Figures in one style, readable on light and on dark pages."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

GREY = "#808080"
STYLE: Any = {
    "text.color": GREY,
    "axes.labelcolor": GREY,
    "axes.edgecolor": GREY,
    "xtick.color": GREY,
    "ytick.color": GREY,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "font.size": 9,
}


@contextmanager
def figure_at(path: Path, columns: int, **shape: Any) -> Iterator[tuple[Any, Any]]:
    """Yield a figure and its axes, side by side on a transparent page; save it at the end."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    with pyplot.rc_context(STYLE):
        figure, axes = pyplot.subplots(1, columns, layout="constrained", **shape)
        yield figure, axes
        figure.savefig(path, dpi=130, transparent=True, metadata={"Software": None})
        pyplot.close(figure)
