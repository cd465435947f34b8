"""Turn numbers of nats into colours and texts, and tokens into signs that can be seen."""

import math
import unicodedata

from fused_sd.checks import check_positive
from fused_sd.credit.tokens import INCOMPLETE, TokenCredit, TopToken

Rgb = tuple[int, int, int]

# Nats at which a colour is full.  They do not depend on the map, so that maps can be compared.
FULL_AT = {"delta": 3.0, "forward_kl": 2.0, "reverse_kl": 2.0, "student_entropy": 3.0}
EXPLANATIONS = {
    "delta": "log P_teacher - log P_student of the token: below 0 the teacher objects to it, "
    "above 0 it wants more of it",
    "forward_kl": "KL(teacher || student): how far the student is from what the teacher would say",
    "reverse_kl": "KL(student || teacher): how much the student says that the teacher would not",
    "student_entropy": "entropy of the student: how undecided it was",
}
# The full colours.  Text on them has a contrast of at least 4.5 (black, a page's ink, and white on
# a dark page), and they have one of at least 3 with the page.
SIDES: dict[str, Rgb] = {
    "approve": (79, 148, 220),
    "object": (210, 123, 46),
    "amount": (169, 127, 212),
}
DARK_SIDES: dict[str, Rgb] = {
    "approve": (53, 119, 189),
    "object": (173, 99, 31),
    "amount": (141, 94, 184),
}
PAPER: Rgb = (255, 255, 255)


def side(name: str, value: float) -> str:
    """Return the name of the colour in ``SIDES``: delta's sign has two, other values have one."""
    if name != "delta":
        return "amount"
    return "object" if value < 0 else "approve"


def strength(name: str, value: float, full_at: float | None = None) -> float:
    """Return the strength of the colour in [0, 1]: 1 for infinite values, 0 for NaN."""
    if math.isnan(value):
        return 0.0
    if full_at is None:
        full_at = FULL_AT[name]
    check_positive("full_at", full_at, "pass None for the default")
    return min(abs(value) / full_at, 1.0)


def rgb(token: TokenCredit, name: str, full_at: float | None = None) -> Rgb:
    """Return the background colour of a token on white paper."""
    value = token.value(name)
    share = strength(name, value, full_at)
    red, green, blue = (
        round(paper + share * (full - paper))
        for paper, full in zip(PAPER, SIDES[side(name, value)])
    )
    return red, green, blue


def nats(value: float, *, signed: bool = False) -> str:
    """Format a number of nats."""
    if not math.isfinite(value):
        return f"{value:+}" if signed and math.isinf(value) else str(value)
    return f"{value:+.2f}" if signed else f"{value:.3f}"


def label(token: TokenCredit | TopToken) -> str:
    """Return a token's visible text; bytes that make no character are named by the token's id."""
    if token.text and not token.text.strip(INCOMPLETE):
        return f"\u2039bytes #{token.token_id}\u203a"
    return visible(token.text)


def visible(text: str) -> str:
    """Replace spaces, line ends and other invisible characters by signs that can be seen."""
    if len(text) > 1:  # inside words of some scripts, and between the parts of an emoji
        return "".join(char if char in JOINERS else _visible(char) for char in text)
    return _visible(text) if text else "\u2205"


def legible(text: str) -> str:
    """Replace invisible characters of a longer text by signs, but not its spaces and line ends."""
    return "".join(char if char in LAYOUT else _visible(char) for char in text)


LAYOUT = " \n\t\u200c\u200d"
JOINERS = "\u200c\u200d"
SIGNS = {" ": "\u00b7", "\n": "\u21b5", "\t": "\u21e5", "\r": "\u240d"}


def _visible(character: str) -> str:
    if character in SIGNS:
        return SIGNS[character]
    # control characters could start a terminal sequence, format characters reverse the line
    if unicodedata.category(character) in ("Cc", "Cf", "Cs", "Zl", "Zp"):
        return f"\u2039U+{ord(character):04X}\u203a"
    return character
