"""Print a credit map: coloured where the terminal shows colours, else with numbers.

Rich finds out what the terminal can do: it shows no colours if the output is a file or a pipe, if
the terminal is dumb, or if ``NO_COLOR`` is set.  Without colours the judgement would be lost, so
strong tokens carry their number then.
"""

import math
from typing import Any

from fused_sd.checks import check_one_of
from fused_sd.checks.extras import require
from fused_sd.credit.scale import EXPLANATIONS, SIDES, label, legible, nats, rgb, strength
from fused_sd.credit.tokens import VALUES, CreditMap, TokenCredit

WORTH_A_NUMBER = 0.2  # strength below which a token carries no number in plain text


def print_map(
    credit: CreditMap,
    *,
    value: str = "delta",
    full_at: float | None = None,
    console: Any = None,
) -> None:
    """Print a map to a terminal, with colours or as ``plain_text``.

    Args:
        credit: the map.
        value: the number that colours the tokens, one of ``VALUES``.
        full_at: nats at which the colour is full.  None: the value's default.
        console: a ``rich.console.Console``.  None: standard output.

    Raises:
        ModuleNotFoundError: rich is not installed.
        ValueError: ``value`` or ``full_at`` is not legal.
    """
    require("credit", "rich")
    from rich.console import Console
    from rich.text import Text

    check_one_of("value", value, VALUES)
    console = Console() if console is None else console
    # no_color keeps bold and dim text, yet drops the colours that carry the judgement
    if console.color_system is None or console.no_color:
        console.out(plain_text(credit, value=value, full_at=full_at), highlight=False)
        return
    console.print(Text(legible(credit.title), style="bold"))
    legend = Text()
    if value == "delta":
        legend.append(" objects ", _style(SIDES["object"])).append(" ")
        legend.append(" approves ", _style(SIDES["approve"])).append(" ")
    else:
        legend.append(" much ", _style(SIDES["amount"])).append(" ")
    console.print(legend.append(EXPLANATIONS[value], "dim"))
    for row in credit.rows:
        text = Text("\n")
        if row.caption:
            text.append(f"{legible(row.caption)}\n", "bold")
        for token in row.tokens:
            is_coloured = strength(value, token.value(value), full_at) > 0
            style = _style(rgb(token, value, full_at)) if is_coloured else ""
            text.append(_shown(token), style)
            if token.text.endswith("\n"):
                text.append("\n")
        console.print(text)


def plain_text(credit: CreditMap, *, value: str = "delta", full_at: float | None = None) -> str:
    """Return the map as text without colours, with strong tokens' numbers in brackets.

    Args:
        credit: the map.
        value: the number to show, one of ``VALUES``.
        full_at: nats at which a token is strongest; tokens of less than a fifth of it carry no
            number.  None: the value's default.

    Raises:
        ValueError: ``value`` or ``full_at`` is not legal.
    """
    check_one_of("value", value, VALUES)
    lines = [legible(credit.title), f"[nat]: {EXPLANATIONS[value]}"]
    for row in credit.rows:
        lines += ["", legible(row.caption)] if row.caption else [""]
        text = ""
        for token in row.tokens:
            number = token.value(value)
            text += _shown(token)
            if math.isnan(number) or strength(value, number, full_at) >= WORTH_A_NUMBER:
                text += f"[{nats(number, signed=value == 'delta')}]"
            if token.text.endswith("\n"):
                text += "\n"
        lines.append(text)
    return "\n".join(lines)


def _shown(token: TokenCredit) -> str:
    """Return a token's visible text, with plain spaces unless it is nothing but white space."""
    return label(token).replace("\u00b7", " ") if token.text.strip() else label(token)


def _style(background: tuple[int, int, int]) -> str:
    red, green, blue = background
    return f"black on rgb({red},{green},{blue})"
