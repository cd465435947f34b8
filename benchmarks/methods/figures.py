"""Results as pictures: all methods together, and each against the others."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.methods.settings import METHODS

GREY = "#808080"  # on nothing: readable on a light page and on a dark one
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


def plots(found: dict[str, Any], folder: Path) -> list[Path]:
    """``methods_<model>.png`` with all methods, ``methods_<model>_<method>.png`` with one each."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"methods_{found['model']}.png"
    together(found["methods"], path)
    paths = [path]
    for name in found["methods"]:
        path = folder / f"methods_{found['model']}_{name}.png"
        alone(name, found["methods"], path)
        paths.append(path)
    return paths


def together(methods: dict[str, Any], path: Path) -> None:
    """Accuracy with its interval, entropy and length by generations."""
    ranked = sorted(methods.items(), key=lambda m: -m[1]["curve"][-1]["accuracy"])
    shape = {"figsize": (11, 3.8), "width_ratios": (2, 1, 1)}
    with figure_at(path, 1, 3, **shape) as (figure, axes):
        for name, method in ranked:
            _accuracy(axes[0], method, _colour(name))
            curve, colour = method["curve"], _colour(name)
            axes[1].plot(_column(curve, "generations"), _column(curve, "entropy"), color=colour)
            axes[2].plot(_column(curve, "generations"), _column(curve, "length"), color=colour)
        labels = ("held-out accuracy, %", "student's entropy, nat", "response length, tokens")
        for axis, label in zip(axes, labels):
            axis.set_title(label, fontsize=9, loc="left")
            axis.set_xlabel("generations")
            axis.grid(alpha=0.25)
            axis.set_ylim(bottom=0)  # a length that does not change shall look like one
        figure.legend(loc="outside right center", frameon=False, labelcolor="linecolor", fontsize=9)


def alone(name: str, methods: dict[str, Any], path: Path) -> None:
    """One method's accuracy with its interval; the others thin and grey."""
    with figure_at(path, 1, 1, figsize=(4.2, 2.4)) as (_, axis):
        for other, method in methods.items():
            if other != name:
                curve = method["curve"]
                x, y = _column(curve, "generations"), _column(curve, "accuracy", 100)
                axis.plot(x, y, color=GREY, alpha=0.35, lw=0.8)
        _accuracy(axis, methods[name], _colour(name))
        title = f"{methods[name]['label']}: held-out accuracy, %"
        axis.set_title(title, fontsize=9, loc="left")
        axis.set_xlabel("generations")
        axis.grid(alpha=0.25)


@contextmanager
def figure_at(path: Path, rows: int, columns: int, **shape: Any) -> Iterator[tuple[Any, Any]]:
    """A figure that is saved at the end."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    with pyplot.rc_context(STYLE):
        figure, axes = pyplot.subplots(rows, columns, layout="constrained", **shape)
        yield figure, axes
        figure.savefig(path, dpi=130, transparent=True, metadata={"Software": None})
        pyplot.close(figure)


def _accuracy(axis: Any, method: dict[str, Any], colour: str) -> None:
    curve = method["curve"]
    x = _column(curve, "generations")
    axis.plot(x, _column(curve, "accuracy", 100), color=colour, label=method["label"])
    low, high = _column(curve, "low", 100), _column(curve, "high", 100)
    axis.fill_between(x, low, high, color=colour, alpha=0.15, lw=0)


def _colour(name: str) -> str:
    """The same for a method in every picture."""
    return f"C{list(METHODS).index(name)}"


def _column(curve: Sequence[dict[str, Any]], name: str, scale: float = 1.0) -> list[float]:
    return [scale * look[name] for look in curve]
