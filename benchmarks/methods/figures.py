"""Plots of the results: all methods together, and single methods against the others."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.methods.settings import METHODS
from benchmarks.plotting import GREY, figure_at

# the methods that the README shows a plot of, by model
SHOWN = {"tiny": ("sdpo", "sd_zero", "rlsd", "opsd_unclipped", "sdft", "grpo")}


def plots(results: dict[str, Any], folder: Path) -> list[Path]:
    """Write the plots that the README shows of a model's results; return their paths."""
    model, methods = results["model"], results["methods"]
    if model not in SHOWN:
        return []
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"methods_{model}.png"]
    together(methods, paths[0])
    for name in SHOWN[model]:
        if name in methods:
            paths.append(folder / f"methods_{model}_{name}.png")
            alone(name, methods, paths[-1])
    return paths


def together(methods: dict[str, Any], path: Path) -> None:
    """Plot every method's accuracy with its interval, entropy and length, by generations."""
    ranked = sorted(methods.items(), key=lambda m: -m[1]["curve"][-1]["accuracy"])
    shape = {"figsize": (11, 3.8), "width_ratios": (2, 1, 1)}
    with figure_at(path, 3, **shape) as (figure, axes):
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
            axis.set_ylim(bottom=0)  # so that a constant length looks constant
        figure.legend(loc="outside right center", frameon=False, labelcolor="linecolor", fontsize=9)


def alone(name: str, methods: dict[str, Any], path: Path) -> None:
    """Plot one method's accuracy with its interval; the others are thin and grey."""
    with figure_at(path, 1, figsize=(4.2, 2.4)) as (_, axis):
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


def _accuracy(axis: Any, method: dict[str, Any], colour: str) -> None:
    curve = method["curve"]
    x = _column(curve, "generations")
    axis.plot(x, _column(curve, "accuracy", 100), color=colour, label=method["label"])
    low, high = _column(curve, "low", 100), _column(curve, "high", 100)
    axis.fill_between(x, low, high, color=colour, alpha=0.15, lw=0)


def _colour(name: str) -> str:
    """Return a method's colour, the same in every plot."""
    return f"C{list(METHODS).index(name)}"


def _column(curve: Sequence[dict[str, Any]], name: str, scale: float = 1.0) -> list[float]:
    return [scale * look[name] for look in curve]
