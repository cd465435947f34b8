"""Draw line charts as inline SVG, coloured by the page's style sheet."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

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
) -> str:
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
        return LEFT + share * (WIDTH - LEFT - RIGHT)

    def at_y(y: float) -> float:
        share = (y - y_ticks[0]) / (y_ticks[-1] - y_ticks[0])
        return HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM)

    parts = [
        f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at_y(y):.1f}" '
        f'y2="{at_y(y):.1f}"/><text class="tick" text-anchor="end" x="{LEFT - 6}" '
        f'y="{at_y(y) + 4:.1f}">{form(y)}</text>'
        for y in y_ticks
    ]
    parts += [
        f'<text class="tick" text-anchor="middle" x="{at_x(x):.1f}" y="{HEIGHT - BOTTOM + 18}">'
        f"{x:.3g}</text>"
        for x in x_ticks
    ]
    across, up = (LEFT + WIDTH - RIGHT) / 2, (TOP + HEIGHT - BOTTOM) / 2
    parts += [
        f'<text class="axis" text-anchor="middle" x="{across}" y="{HEIGHT - 8}">'
        "training step</text>",
        f'<text class="axis" text-anchor="middle" transform="translate(14 {up}) rotate(-90)">'
        f"{escape(y_label)}</text>",
    ]
    parts += [_curve(line, at_x, at_y, form) for line in drawn]
    legend = "".join(
        f'<span class="key"><i class="{escape(line.css_class)}"></i>{escape(line.name)}</span>'
        for line in drawn
    )
    return (
        f"<figure><figcaption>{escape(title)}</figcaption>"
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">'
        f"{''.join(parts)}</svg><div>{legend}</div></figure>"
    )


def _curve(
    line: Line,
    at_x: Callable[[float], float],
    at_y: Callable[[float], float],
    form: Callable[[float], str],
) -> str:
    places = " ".join(f"{at_x(x):.1f},{at_y(y):.1f}" for x, y in line.points)
    dots = "".join(
        f'<circle class="{escape(line.css_class)}" cx="{at_x(x):.1f}" cy="{at_y(y):.1f}" r="2.5">'
        f"<title>{escape(line.name)}, step {x:.3g}: {form(y)}</title></circle>"
        for x, y in line.points
    )
    return f'<polyline class="{escape(line.css_class)}" points="{places}"/>{dots}'
