"""Draw line charts as inline SVG, coloured by the page's style sheet."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from fused_sd.credit.html import fragment

WIDTH, HEIGHT = 360, 240
LEFT, RIGHT, TOP, BOTTOM = 74, 14, 10, 52


@dataclass(frozen=True)
class Line:
    """Hold one curve: its name in the legend, its (x, y) points and the CSS class that draws it."""

    name: str
    points: Sequence[tuple[float, float]]
    css_class: str


def percent(value: float) -> str:
    return f"{100 * value:.0f} %"


def ticks(low: float, high: float) -> list[float]:
    """Return about five evenly spaced round numbers, from at most ``low`` to at least ``high``."""
    if high <= low:
        high = low + 1.0
    rough = (high - low) / 4
    magnitude = 10.0 ** math.floor(math.log10(rough))
    step = next(m * magnitude for m in (1, 2, 2.5, 5, 10) if m * magnitude >= rough * (1 - 1e-9))
    first = math.floor(low / step + 1e-9)
    last = math.ceil(high / step - 1e-9)
    return [round(n * step, 12) for n in range(first, last + 1)]


def line_chart(
    title: str, lines: Sequence[Line], *, y_label: str = "", is_share: bool = False
) -> Markup:
    """Return a figure with a caption, a legend and an SVG; pointing at a dot shows its value.

    Args:
        title: the caption.
        lines: the curves by training steps; those without points are left out.
        y_label: what y is, and its unit.
        is_share: y is shown in percent, on an axis up to 100 %.  The axis always starts at 0.

    Raises:
        ValueError: there is no point to draw.
    """
    drawn = [line for line in lines if line.points]
    if not drawn:
        raise ValueError(
            f"lines must hold at least one point, got none for {title!r}; leave the chart out"
        )
    form = percent if is_share else "{:.3g}".format
    xs = [x for line in drawn for x, _ in line.points]
    x_ticks = ticks(min(xs), max(xs))
    y_ticks = ticks(0.0, 1.0 if is_share else max(y for line in drawn for _, y in line.points))

    def at_x(x: float) -> float:
        share = (x - x_ticks[0]) / (x_ticks[-1] - x_ticks[0])
        return round(LEFT + share * (WIDTH - LEFT - RIGHT), 1)

    def at_y(y: float) -> float:
        share = (y - y_ticks[0]) / (y_ticks[-1] - y_ticks[0])
        return round(HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM), 1)

    return fragment(
        "chart.html",
        "fused_sd.demo",
        width=WIDTH,
        height=HEIGHT,
        title=title,
        lines=drawn,
        y_label=y_label,
        x_ticks=x_ticks,
        y_ticks=y_ticks,
        at_x=at_x,
        at_y=at_y,
        form=form,
    )
