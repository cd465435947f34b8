"""Completions as coloured tokens: what the teacher would rather have seen, and how strongly."""

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

FULL_COLOUR_AT = 6.0  # nats of credit at which a token is as strongly coloured as it gets


def colour(credit: float) -> str:
    """CSS of one token: blue where the teacher approves, orange where it objects.

    The strength is a share of the page's own colours, so that it is right in light and in dark.
    """
    if not math.isfinite(credit):
        raise ValueError(
            f"credit must be a finite number of nats, got {credit}; "
            "a token that a distribution excludes has no credit to show"
        )
    share = min(abs(credit) / FULL_COLOUR_AT, 1.0)
    side = "approve" if credit >= 0 else "object"
    return f"background:color-mix(in srgb,var(--{side}) {100 * share:.0f}%,var(--panel))"


def visible(token: str) -> str:
    """A token as text one can see: the space in front and the line's end get a sign."""
    return escape(token).replace("\n", "&#8629;").replace(" ", "&#183;") or "&#8709;"


def token_chip(token: Mapping[str, Any]) -> str:
    """One token with its credit; hovering, tapping or focusing it shows both distributions."""
    note = (
        f"<b>credit {token['credit']:+.2f} nat</b>, KL {token['kl']:.3f}"
        f"<br>student {_likeliest(token['student_top'])}"
        f"<br>teacher {_likeliest(token['teacher_top'])}"
    )
    return (
        f'<span class="chip" tabindex="0" style="{colour(token["credit"])}">'
        f'{visible(token["token"])}<span class="note">{note}</span></span>'
    )


def credit_map(rows: Sequence[Mapping[str, Any]]) -> str:
    """A table: the word, its completion before training and after, token by token."""
    body = "".join(
        f"<tr><th>{escape(row['word'])} -&gt;</th>"
        f"<td>{''.join(token_chip(token) for token in row['before'])}</td>"
        f"<td>{''.join(token_chip(token) for token in row['after'])}</td></tr>"
        for row in rows
    )
    return (
        '<table class="credit"><thead><tr><th>question</th><th>before</th><th>after</th></tr>'
        f"</thead><tbody>{body}</tbody></table>"
    )


def _likeliest(top: Sequence[Sequence[Any]]) -> str:
    return ", ".join(f"{visible(token)} {100 * share:.1f}&#8239;%" for token, share in top)
