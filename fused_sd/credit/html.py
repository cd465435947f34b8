"""Write a credit map as one HTML file, for light and dark screens and for phones.

The page loads nothing and has no script.  Each token is a *chip* that carries its strengths by all
values as CSS variables; the radio buttons select one of them with ``body:has(:checked)``.
"""

from collections.abc import Sequence
from html import escape
from os import PathLike
from pathlib import Path

from fused_sd.checks import check_one_of
from fused_sd.credit.scale import EXPLANATIONS, FULL_AT, nats, side, strength, visible
from fused_sd.credit.tokens import VALUES, CreditMap, CreditRow, TokenCredit, TopToken

NAMES = {
    "delta": "delta",
    "forward_kl": "forward KL",
    "reverse_kl": "reverse KL",
    "student_entropy": "student entropy",
}
# colours and body of any page; the demo's report uses them too
BASE = """
:root{color-scheme:light dark;--page:#fbfaf8;--panel:#ffffff;--ink:#1d1f23;--quiet:#62666d;
--rule:#dedcd6;--approve:#7db3ee;--object:#f2a35c;--amount:#be96de;--c0:#1f6fc4}
@media (prefers-color-scheme:dark){:root{--page:#15171a;--panel:#1e2125;--ink:#e8e6e1;
--quiet:#9aa0a8;--rule:#363a40;--approve:#2f6fb3;--object:#a85f1c;--amount:#7a4ba3;--c0:#6db1f7}}
*{box-sizing:border-box}
body{margin:0;background:var(--page);color:var(--ink);
font:16px/1.55 system-ui,-apple-system,"Segoe UI",sans-serif}
"""
CHIPS = """
.chip{position:relative;display:inline-block;padding:.05rem .2rem;margin:0 1px 2px 0;
border-radius:4px;border:1px solid var(--rule);cursor:default;white-space:pre-wrap;
overflow-wrap:anywhere;--share:var(--delta);--hue:var(--side);
background:color-mix(in srgb,var(--hue) var(--share),var(--panel));
font-family:ui-monospace,Menlo,Consolas,monospace}
.approve{--side:var(--approve)}.object{--side:var(--object)}
.note{display:none;position:fixed;left:1rem;right:1rem;bottom:1rem;z-index:2;margin:0 auto;
max-width:40rem;padding:.7rem .9rem;background:var(--panel);color:var(--ink);
border:1px solid var(--quiet);border-radius:8px;white-space:normal;font-size:.88rem;
box-shadow:0 6px 24px rgba(0,0,0,.25)}
.chip:hover>.note,.chip:focus>.note{display:block}
.chip:focus{outline:2px solid var(--c0)}
""" + "".join(
    f"body:has(#by-{name}:checked) .chip{{--share:var(--{name});"
    f"--hue:var(--{'side' if name == 'delta' else 'amount'})}}\n"
    f"body:has(#by-{name}:checked) .about-{name}{{display:block}}\n"
    for name in VALUES
)
PAGE = """
main{max-width:60rem;margin:0 auto;padding:1rem 1rem 9rem}
h1{font-size:1.5rem;line-height:1.2;margin:.5rem 0}
h2{font-size:1rem;margin:1.6rem 0 .4rem;overflow-wrap:anywhere}
label{margin-right:1rem;white-space:nowrap}
.about{display:none;margin:.4rem 0;color:var(--quiet);font-size:.92rem}
.response{margin:0;line-height:1.9}
details{color:var(--quiet);font-size:.88rem}
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
    return f'<iframe srcdoc="{page}" style="width:100%;height:32rem;border:0"></iframe>'


def _row(row: CreditRow, scales: dict[str, float | None]) -> str:
    chips = "".join(_chip(token, scales) for token in row.tokens) or "(no token)"
    prompts = "".join(
        f"<details><summary>{label}</summary><pre>{escape(text)}</pre></details>"
        for label, text in (
            ("What the student read", row.student_prompt),
            ("What the teacher read", row.teacher_prompt),
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
        f"<b>{_text(token.text)}</b> delta <b>{nats(token.delta, signed=True)} nat</b>"
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
        f'{_text(token.text)}<span class="note">{note}</span></span>{line_end}'
    )


def _legend(value: str, full_at: float | None) -> str:
    buttons = "".join(
        f'<label><input type="radio" name="by" id="by-{name}"'
        f"{' checked' if name == value else ''}> {NAMES[name]}</label>"
        for name in VALUES
    )
    abouts = "".join(
        f'<p class="about about-{name}">{_samples(name)} {escape(EXPLANATIONS[name])}. Full colour '
        f"at {full_at if full_at is not None and name == value else FULL_AT[name]:g} nat. "
        "Point at a token, or tap it, to see both distributions.</p>"
        for name in VALUES
    )
    return f"<form>{buttons}</form>{abouts}"


def _samples(name: str) -> str:
    words = {"object": "objects", "approve": "approves"} if name == "delta" else {"approve": "much"}
    return " ".join(
        f'<span class="chip {css_class}" style="--{name}:100%">{word}</span>'
        for css_class, word in words.items()
    )


def _likeliest(top: Sequence[TopToken]) -> str:
    return ", ".join(f"{_text(token.text)} {100 * token.prob:.1f}&#8239;%" for token in top)


def _text(text: str) -> str:
    return escape(visible(text))
