"""A credit map in the terminal: colours through rich, or numbers where colours are off."""

from typing import Any

from fused_sd.checks import check_one_of
from fused_sd.credit.scale import EXPLANATIONS, SIDES, nats, rgb, strength, visible
from fused_sd.credit.tokens import VALUES, CreditMap, TokenCredit

WORTH_A_NUMBER = 0.2  # of the full strength: weaker tokens carry no number in plain text


def print_map(
    credit: CreditMap,
    *,
    value: str = "delta",
    full_at: float | None = None,
    console: Any = None,
) -> None:
    """Print a map, coloured where the terminal shows colours.

    Args:
        value: what colours the tokens, one of ``VALUES``.
        full_at: nats at which the colour is full; None: the value's default.
        console: a ``rich.console.Console``; None: standard output's.

    Raises:
        ImportError: rich is not installed.
    """
    try:
        from rich.console import Console
        from rich.text import Text
    except ImportError as error:
        raise ImportError("the terminal's colours need rich; pip install rich") from error
    check_one_of("value", value, VALUES)
    console = Console() if console is None else console
    if console.color_system is None or console.no_color:
        console.out(plain_text(credit, value=value, full_at=full_at), highlight=False)
        return
    console.print(Text(credit.title, style="bold"))
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
            text.append(f"{row.caption}\n", "bold")
        for token in row.tokens:
            is_coloured = strength(value, token.value(value), full_at) > 0
            style = _style(rgb(token, value, full_at)) if is_coloured else ""
            text.append(_shown(token), style)
            if token.text.endswith("\n"):
                text.append("\n")
        console.print(text)


def plain_text(credit: CreditMap, *, value: str = "delta", full_at: float | None = None) -> str:
    """The map without colours: tokens that would be coloured carry their number in brackets."""
    check_one_of("value", value, VALUES)
    lines = [credit.title, f"[nat]: {EXPLANATIONS[value]}"]
    for row in credit.rows:
        lines += ["", row.caption] if row.caption else [""]
        text = ""
        for token in row.tokens:
            number = token.value(value)
            text += _shown(token)
            is_weak = strength(value, number, full_at) < WORTH_A_NUMBER
            if number != number or not is_weak:
                text += f"[{nats(number, signed=value == 'delta')}]"
            if token.text.endswith("\n"):
                text += "\n"
        lines.append(text)
    return "\n".join(lines)


def _shown(token: TokenCredit) -> str:
    """A token; between readable words a space may be a space."""
    return visible(token.text).replace("\u00b7", " ") if token.text.strip() else visible(token.text)


def _style(background: tuple[int, int, int]) -> str:
    red, green, blue = background
    return f"black on rgb({red},{green},{blue})"
