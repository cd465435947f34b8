"""Write a credit map as one HTML file, for light and dark screens and for phones.

The page loads nothing and has no script.  Each token is a *chip* that carries its strengths by all
values as CSS variables; the radio buttons select one of them with ``body:has(:checked)``.
"""

from collections.abc import Sequence
from html import escape
from os import PathLike
from pathlib import Path

from fused_sd.checks import check_one_of
from fused_sd.credit.scale import (
    DARK_SIDES,
    EXPLANATIONS,
    FULL_AT,
    SIDES,
    Rgb,
    label,
    nats,
    side,
    strength,
)
from fused_sd.credit.tokens import VALUES, CreditMap, CreditRow, TokenCredit, TopToken

NAMES = {
    "delta": "delta",
    "forward_kl": "forward KL",
    "reverse_kl": "reverse KL",
    "student_entropy": "student entropy",
}
SIGNS = (
    "&#183; is a space, &#8629; the end of a line, &#8677; a tab, &#8709; a token without text. "
    "&#233;(1/2) and &#233;(2/2) are tokens that share the bytes of one character; "
    "&#8249;bytes #7&#8250; is token 7, whose bytes make no character; "
    "&#8249;U+202E&#8250; names a character that cannot be seen."
)


def _hues(sides: dict[str, Rgb]) -> str:
    """Return full colours as CSS variables."""
    return "".join(f"--{name}:#{bytes(levels).hex()};" for name, levels in sides.items())


# colours and body of any page; the demo's report uses them too
BASE = f"""
:root{{color-scheme:light dark;--page:#fbfaf8;--panel:#ffffff;--ink:#1d1f23;--quiet:#62666d;
--rule:#dedcd6;--c0:#1f6fc4;--on:#1d1f23;{_hues(SIDES)}}}
@media (prefers-color-scheme:dark){{:root{{--page:#15171a;--panel:#1e2125;--ink:#e8e6e1;
--quiet:#9aa0a8;--rule:#363a40;--c0:#6db1f7;--on:#ffffff;{_hues(DARK_SIDES)}}}}}
*{{box-sizing:border-box}}
body{{margin:0;background:var(--page);color:var(--ink);
font:16px/1.55 system-ui,-apple-system,"Segoe UI",sans-serif}}
"""
# a token's lower edge is dashed where the teacher objects, for eyes that cannot tell the colours
CHIPS = """
.chip{position:relative;display:inline-block;padding:.05rem .2rem;margin:0 1px 2px 0;
border-radius:4px;border:1px solid var(--rule);cursor:default;white-space:pre-wrap;
overflow-wrap:anywhere;--share:var(--delta);--hue:var(--side);--edge:var(--dash);
color:var(--on);background:color-mix(in srgb,var(--hue) var(--share),var(--panel));
border-bottom:2px var(--edge) color-mix(in srgb,var(--ink) var(--share),var(--rule));
font-family:ui-monospace,Menlo,Consolas,monospace;print-color-adjust:exact}
.approve{--side:var(--approve);--dash:solid}.object{--side:var(--object);--dash:dashed}
.note{display:none;position:fixed;left:1rem;right:1rem;bottom:1rem;z-index:2;margin:0 auto;
max-width:40rem;padding:.7rem .9rem;background:var(--panel);color:var(--ink);
border:1px solid var(--quiet);border-radius:8px;white-space:normal;font-size:.88rem;
box-shadow:0 6px 24px rgba(0,0,0,.25)}
.chip:hover>.note,.chip:focus>.note{display:block}
.chip:focus{outline:2px solid var(--c0)}
""" + "".join(
    f"body:has(#by-{name}:checked) .chip{{--share:var(--{name});"
    f"--hue:var(--{'side' if name == 'delta' else 'amount'});"
    f"--edge:{'var(--dash)' if name == 'delta' else 'solid'}}}\n"
    f"body:has(#by-{name}:checked) .about-{name}{{display:block}}\n"
    for name in VALUES
)
PAGE = """
main{max-width:60rem;margin:0 auto;padding:1rem 1rem 9rem}
h1{font-size:1.5rem;line-height:1.2;margin:.5rem 0}
h2{font-size:1rem;margin:1.6rem 0 .4rem;overflow-wrap:anywhere}
fieldset{border:0;margin:0;padding:0}
legend{float:left;padding:0;margin-right:1rem;color:var(--quiet)}
label{display:inline-block;margin-right:1rem;white-space:nowrap}
.about{display:none;margin:.4rem 0}
.bar{height:1rem;border:1px solid var(--quiet);border-radius:4px;print-color-adjust:exact;
background:linear-gradient(to right,var(--panel),var(--amount))}
.about-delta .bar{background:linear-gradient(to right,var(--object),var(--panel),var(--approve))}
.ticks{display:flex;justify-content:space-between;font-size:.88rem}
.ticks span{display:flex;justify-content:center;width:0;white-space:nowrap}
.ticks span:first-child{justify-content:flex-start}.ticks span:last-child{justify-content:flex-end}
figcaption,details{color:var(--quiet);font-size:.88rem}
.response{margin:0;line-height:1.9}
pre{white-space:pre-wrap;overflow-wrap:anywhere;margin:.3rem 0;padding:.5rem;
border:1px solid var(--rule);border-radius:4px}
"""


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
    scales = {value: full_at}
    rows = "".join(_row(row, scales) for row in credit.rows) or "<p>No response to show.</p>"
    heading = f"<h1>{escape(credit.title)}</h1>"
    return document(credit.title, PAGE, f"{heading}{_legend(value, full_at)}{rows}")


def document(title: str, styles: str, body: str) -> str:
    """Return a page of one file that may hold chips: its head, ``styles`` and the body in main."""
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{BASE}{styles}{CHIPS}</style></head>"
        f"<body><main>{body}</main></body></html>\n"
    )


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


def token_chips(row: CreditRow) -> str:
    """Return the tokens of a response as HTML for a ``document``, on the default scales."""
    return "".join(_chip(token, {}) for token in row.tokens)


def notebook_frame(credit: CreditMap) -> str:
    """Return the page inside a frame, which keeps its styles from the rest of the notebook."""
    page = escape(html_page(credit))
    title = escape(credit.title)
    style = "width:100%;height:32rem;border:0"
    return f'<iframe title="{title}" srcdoc="{page}" style="{style}"></iframe>'


def _row(row: CreditRow, scales: dict[str, float | None]) -> str:
    chips = "".join(_chip(token, scales) for token in row.tokens) or "(no token)"
    prompts = "".join(
        f"<details{is_open}><summary>{reader} read</summary><pre>{escape(text)}</pre></details>"
        for reader, text, is_open in (
            ("What the teacher", row.teacher_prompt, ""),
            ("What the student", row.student_prompt, " open"),  # the response continues it
        )
        if text
    )
    heading = f"<h2>{escape(row.caption)}</h2>" if row.caption else ""
    return f'<section>{heading}{prompts}<p class="response">{chips}</p></section>'


def _chip(token: TokenCredit, scales: dict[str, float | None]) -> str:
    """Return a token with its strengths and the note that appears on hover or focus."""
    shares = ";".join(
        f"--{name}:{100 * strength(name, token.value(name), scales.get(name)):.0f}%"
        for name in VALUES
    )
    note = (
        f"<b>{_text(token)}</b> delta <b>{nats(token.delta, signed=True)} nat</b>"
        f"<br>log-prob: student {nats(token.student_log_prob)}, "
        f"teacher {nats(token.teacher_log_prob)}"
        f"<br>forward KL {nats(token.forward_kl)}, reverse KL {nats(token.reverse_kl)}"
        f"<br>entropy: student {nats(token.student_entropy)}, "
        f"teacher {nats(token.teacher_entropy)}"
        f"<br>student: {_likeliest(token.student_top)}"
        f"<br>teacher: {_likeliest(token.teacher_top)}"
    )
    line_end = "<br>" if token.text.endswith("\n") else ""
    return (
        f'<span class="chip {side("delta", token.delta)}" tabindex="0" style="{shares}">'
        f'{_text(token)}<span class="note">{note}</span></span>{line_end}'
    )


def _legend(value: str, full_at: float | None) -> str:
    buttons = "".join(
        f'<label><input type="radio" name="by" id="by-{name}"'
        f"{' checked' if name == value else ''}> {NAMES[name]}</label>"
        for name in VALUES
    )
    scales = "".join(
        _scale(name, full_at if full_at is not None and name == value else FULL_AT[name])
        for name in VALUES
    )
    return (
        f"<form><fieldset><legend>Colour</legend>{buttons}</fieldset></form>{scales}"
        "<p>Point at a token, or tap it, to see both distributions.</p>"
        f"<details><summary>Signs</summary>{SIGNS}</details>"
    )


def _scale(name: str, full_at: float) -> str:
    """Return the bar of a value's colours, with numbers below it."""
    marks: tuple[float, ...]
    if name == "delta":
        marks, words = (-1.0, -0.5, 0.0, 0.5, 1.0), ("objects", "nat", "wants more")
    else:
        marks, words = (0.0, 0.5, 1.0), ("little", "nat", "much")
    numbers = [f"{mark * full_at:g}".replace("-", "\u2212") for mark in marks]
    rows = "".join(
        f'<div class="ticks">{"".join(f"<span>{text}</span>" for text in texts)}</div>'
        for texts in (numbers, words)
    )
    return (
        f'<figure class="about about-{name}"><div class="bar"></div>{rows}'
        f"<figcaption>{escape(EXPLANATIONS[name])}.</figcaption></figure>"
    )


def _likeliest(top: Sequence[TopToken]) -> str:
    return ", ".join(f"{_text(token)} {100 * token.prob:.1f}&#8239;%" for token in top)


def _text(token: TokenCredit | TopToken) -> str:
    return escape(label(token))
