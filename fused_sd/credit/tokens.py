"""The data of a credit map: responses, their tokens, and both distributions' numbers for each."""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from fused_sd.checks import check_one_of, fail

FORMAT = "fused_sd credit map"
INCOMPLETE = "\ufffd"  # decoders return this for bytes that make no character
VALUES = ("delta", "forward_kl", "reverse_kl", "student_entropy")
"""Names of the numbers that can colour a token; of these only delta has a sign."""


@dataclass(frozen=True)
class TopToken:
    """Hold one of the likeliest tokens of a distribution, with its probability in [0, 1]."""

    token_id: int
    text: str
    prob: float


@dataclass(frozen=True)
class TokenCredit:
    """Describe one token of a response under both distributions; all numbers are in nats.

    Attributes:
        token_id: the token.
        text: its text.  Tokens that share the bytes of one character read "é(1/2)" and
            "é(2/2)"; bytes that make no character are U+FFFD.
        student_log_prob: the student's log-probability of the token; -inf if its vocabulary lacks
            the token.
        teacher_log_prob: the teacher's log-probability of the token, with the same rule.
        forward_kl: KL(teacher || student) of the distributions at this position.
        reverse_kl: KL(student || teacher) there.
        student_entropy: entropy of the student's distribution.
        teacher_entropy: entropy of the teacher's distribution.
        student_top: the student's likeliest tokens, likeliest first.
        teacher_top: the teacher's likeliest tokens, likeliest first.
    """

    token_id: int
    text: str
    student_log_prob: float
    teacher_log_prob: float
    forward_kl: float
    reverse_kl: float
    student_entropy: float
    teacher_entropy: float
    student_top: tuple[TopToken, ...] = ()
    teacher_top: tuple[TopToken, ...] = ()

    @property
    def delta(self) -> float:
        """The teacher's log-probability minus the student's; 0 if both are -inf.

        Above 0 the teacher wants more of the token, below 0 less.
        """
        if self.teacher_log_prob == self.student_log_prob:
            return 0.0
        return self.teacher_log_prob - self.student_log_prob

    def value(self, name: str) -> float:
        """Return the number of this name, one of ``VALUES``."""
        check_one_of("value", name, VALUES)
        value: float = getattr(self, name)
        return value


@dataclass(frozen=True)
class CreditRow:
    """Hold one response.

    Attributes:
        tokens: the response's tokens, without masked ones.
        caption: a line to show above the response.
        student_prompt: the text that the student read, empty if unknown.
        teacher_prompt: the text that the teacher read, empty if unknown.
    """

    tokens: tuple[TokenCredit, ...]
    caption: str = ""
    student_prompt: str = ""
    teacher_prompt: str = ""


@dataclass(frozen=True)
class CreditMap:
    """Hold responses with the teacher's judgement of each token.

    A notebook shows a map as its HTML page.

    Examples:
        >>> from fused_sd.credit import CreditMap, CreditRow, TokenCredit
        >>> token = TokenCredit(7, "fox", -2.0, -0.5, 0.1, 0.2, 1.0, 0.8)  # wanted by the teacher
        >>> found = CreditMap((CreditRow((token,), caption="step 10"),), title="Foxes")
        >>> CreditMap.from_json(found.to_json()) == found
        True
        >>> found.rows[0].tokens[0].delta
        1.5
    """

    rows: tuple[CreditRow, ...]
    title: str = "Credit map"

    def to_json(self) -> str:
        """Return the map as JSON; numbers that JSON lacks are the strings "inf", "-inf", "nan"."""
        return json.dumps({"format": FORMAT, **_writable(asdict(self))}, allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> "CreditMap":
        """Read a map that ``to_json`` wrote.

        Raises:
            ValueError: the text is not JSON, not a credit map, or lacks a field, or one has another
            type.
        """
        remedy = "pass the text that CreditMap.to_json wrote"
        try:
            data = json.loads(text)
        except (ValueError, RecursionError) as error:
            data = error
        if not isinstance(data, dict) or data.get("format") != FORMAT:
            fail("text", "be a credit map in JSON", _short(data), remedy)
        try:
            rows = tuple(_read_row(row) for row in data["rows"])
            return cls(rows, _text(data, "title"))
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            fail("text", "hold every field of a credit map", repr(error), remedy)
            raise

    def _repr_html_(self) -> str:
        """Return what a notebook shows."""
        from fused_sd.credit.html import notebook_frame

        return notebook_frame(self)


def _writable(value: Any) -> Any:
    """Replace floats that JSON cannot hold by their names."""
    if isinstance(value, Mapping):
        return {name: _writable(entry) for name, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_writable(entry) for entry in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


def _read_row(row: Mapping[str, Any]) -> CreditRow:
    tokens = tuple(_read(TokenCredit, token) for token in row["tokens"])
    texts = [_text(row, name) for name in ("caption", "student_prompt", "teacher_prompt")]
    return CreditRow(tokens, *texts)


def _read(kind: type[Any], found: Mapping[str, Any]) -> Any:
    """Make a ``TokenCredit`` or ``TopToken`` of every field in ``found``; floats may be strings."""
    values = {field.name: found[field.name] for field in fields(kind)}
    for field in fields(kind):
        if field.type in (int, float):
            values[field.name] = field.type(values[field.name])
        elif field.name.endswith("_top"):
            values[field.name] = tuple(_read(TopToken, top) for top in values[field.name])
        else:
            values[field.name] = _text(found, field.name)
    return kind(**values)


def _text(found: Mapping[str, Any], name: str) -> str:
    value = found[name]
    if not isinstance(value, str):
        raise TypeError(f"{name} is no text: {_short(value)}")
    return value


def _short(data: object) -> str:
    text = repr(data)
    return text if len(text) <= 60 else text[:57] + "..."
