"""Draw a credit map with matplotlib: wrapped lines of tokens on coloured boxes."""

import math
import textwrap
import unicodedata
import warnings
from os import PathLike
from typing import Any

from fused_sd.checks import check_one_of
from fused_sd.checks.extras import require
from fused_sd.credit.scale import EXPLANATIONS, label, nats, rgb
from fused_sd.credit.tokens import VALUES, CreditMap, TokenCredit

COLUMN, LINE = 0.09, 0.22  # width and height in inches of a monospaced character of 10 points
MAX_PIXELS = 60_000  # of one side; matplotlib draws at most 2**16
Placed = tuple[float, int, str, TokenCredit | None]  # column, line, text, token


def credit_figure(
    credit: CreditMap, *, value: str = "delta", full_at: float | None = None, columns: int = 100
) -> Any:
    """Draw a map as a ``matplotlib.figure.Figure``.

    Args:
        credit: the map.
        value: the number that colours the tokens, one of ``VALUES``.
        full_at: nats at which the colour is full.  None: the value's default.
        columns: number of characters on a line.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
        ValueError: ``value`` or ``full_at`` is not legal.
    """
    require("credit", "matplotlib")
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    check_one_of("value", value, VALUES)
    placed, num_lines = _layout(credit, value, columns)
    figure = Figure(figsize=((columns + 2) * COLUMN, (num_lines + 1) * LINE))
    axes = figure.add_axes((0.0, 0.0, 1.0, 1.0), xlim=(-1, columns + 1), ylim=(num_lines, -1))
    axes.set_axis_off()
    for column, line, text, token in placed:
        if token is not None:
            box = Rectangle(
                (column, line - 0.45),
                _width(text),
                0.9,
                facecolor=tuple(level / 255 for level in rgb(token, value, full_at)),
                edgecolor="#c9c6bf",
                linewidth=0.4,
            )
            axes.add_patch(box)
        axes.text(
            column if token is None else column + _width(text) / 2,
            line,
            text,
            family="monospace",
            size=10,
            weight="bold" if token is None else "normal",
            horizontalalignment="left" if token is None else "center",
            verticalalignment="center",
            parse_math=False,
        )
    return figure


def save_png(
    credit: CreditMap,
    path: str | PathLike[str],
    *,
    value: str = "delta",
    full_at: float | None = None,
    columns: int = 100,
) -> None:
    """Write ``credit_figure`` to a PNG file.

    Args:
        credit, value, full_at, columns: as in ``credit_figure``.
        path: the file to write.

    Raises:
        ModuleNotFoundError, ValueError: as in ``credit_figure``.
    """
    figure = credit_figure(credit, value=value, full_at=full_at, columns=columns)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # it draws a box instead
        figure.savefig(path, format="png", dpi=min(150, MAX_PIXELS / figure.get_figheight()))


def _width(text: str) -> int:
    """Count the columns that a text takes in a monospaced font."""
    return sum(2 if unicodedata.east_asian_width(char) in "WF" else 1 for char in text)


def _layout(credit: CreditMap, value: str, columns: int) -> tuple[list[Placed], int]:
    """Place every text on a line and column; also return the number of lines."""
    about = f"{credit.title}: {EXPLANATIONS[value]}"
    placed: list[Placed] = []
    line = 0
    for text in textwrap.wrap(about, columns):
        placed.append((0, line, text, None))
        line += 1
    for row in credit.rows:
        line += 1
        for text in textwrap.wrap(row.caption, columns):
            placed.append((0, line, text, None))
            line += 1
        column = 0
        for token in row.tokens:
            for text in _wrapped(_label(token, value), columns):
                if column + _width(text) > columns:
                    column, line = 0, line + 1
                placed.append((column, line, text, token))
                column += _width(text)
            if token.text.endswith("\n"):
                column, line = 0, line + 1
        line += 1 if column else 0
    return placed, line


def _label(token: TokenCredit, value: str) -> str:
    """Return a token's visible text, with its number where no colour can show it."""
    number = token.value(value)
    text = label(token)
    return text if math.isfinite(number) else f"{text}[{nats(number)}]"


def _wrapped(text: str, columns: int) -> list[str]:
    """Cut a text into pieces that fit on a line; wide characters take two columns."""
    half = max(columns // 2, 1)
    step = columns if _width(text) == len(text) else half
    return [text[start : start + step] for start in range(0, len(text), step)]
