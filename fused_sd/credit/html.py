"""Write a credit map as one HTML file, for light and dark screens and for phones.

The page loads nothing and has no script.  Each token is a *chip* that carries its strengths by all
values as CSS variables; the radio buttons select one of them with ``body:has(:checked)``.
"""

from collections.abc import Sequence
from functools import cache
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING

from fused_sd.checks import check_one_of
from fused_sd.credit.scale import (
    DARK_SIDES,
    EXPLANATIONS,
    FULL_AT,
    SIDES,
    label,
    legible,
    nats,
    side,
    strength,
)
from fused_sd.credit.tokens import VALUES, CreditMap, CreditRow, TopToken

if TYPE_CHECKING:
    from jinja2 import Environment, Template
    from markupsafe import Markup


def template(name: str, package: str = "fused_sd.credit") -> "Template":
    """Return a package's template, which may use those of this package.

    It escapes every text that it shows, and refuses a name that it was not given.
    """
    return _environment(package).get_template(name)


def fragment(name: str, package: str = "fused_sd.credit", /, **values: object) -> "Markup":
    """Return a filled template as HTML for another template, which does not escape it again."""
    from markupsafe import Markup

    return Markup(template(name, package).render(values))


@cache
def _environment(package: str) -> "Environment":
    from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=ChoiceLoader([PackageLoader(package), PackageLoader("fused_sd.credit")]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    colours = {"SIDES": SIDES, "DARK_SIDES": DARK_SIDES}
    environment.globals |= {**colours, "VALUES": VALUES, "EXPLANATIONS": EXPLANATIONS}
    environment.globals |= {
        f.__name__: f for f in (label, legible, likeliest, nats, side, strength)
    }
    return environment


def html_page(credit: CreditMap, *, value: str = "delta", full_at: float | None = None) -> str:
    """Return a map as an HTML page.

    Args:
        credit: the map.
        value: the number that colours the tokens when the page opens, one of ``VALUES``.
        full_at: nats at which that value's colour is full.  None: the value's default.

    Raises:
        ValueError: ``value`` or ``full_at`` is not legal.
    """
    check_one_of("value", value, VALUES)
    scales = FULL_AT if full_at is None else FULL_AT | {value: full_at}
    return template("map.html").render(credit=credit, value=value, scales=scales)


def save_html(
    credit: CreditMap,
    path: str | PathLike[str],
    *,
    value: str = "delta",
    full_at: float | None = None,
) -> None:
    """Write ``html_page`` to a file.

    Args:
        credit, value, full_at: as in ``html_page``.
        path: the file to write, in UTF-8.
    """
    Path(path).write_text(html_page(credit, value=value, full_at=full_at), encoding="utf-8")


def token_chips(row: CreditRow) -> "Markup":
    """Return the tokens of a response as HTML for another template, on the default scales."""
    return fragment("chips.html", row=row, scales=FULL_AT)


def notebook_frame(credit: CreditMap) -> str:
    """Return the page inside a frame, which keeps its styles from the rest of the notebook."""
    return template("frame.html").render(title=credit.title, page=html_page(credit))


def likeliest(top: Sequence[TopToken]) -> str:
    """Return the likeliest tokens with their probabilities."""
    return ", ".join(f"{label(token)} {100 * token.prob:.1f}\u202f%" for token in top)
