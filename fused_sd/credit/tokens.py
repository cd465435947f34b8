"""A credit map as data: responses, their tokens, and what both distributions say of each."""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from fused_sd.checks import check_one_of, fail

FORMAT = "fused_sd credit map"
VALUES = ("delta", "forward_kl", "reverse_kl", "student_entropy")
"""What a token can be coloured by; only delta has a sign."""


@dataclass(frozen=True)
class TopToken:
    """One of the likeliest tokens of a distribution."""

    token_id: int
    text: str
    prob: float


@dataclass(frozen=True)
class TokenCredit:
    """One token of a response under both distributions; nats.

    Attributes:
        token_id: the token.
        text: its text.  Tokens that share one character: the last has it, the others U+FFFD.
        student_log_prob: log P_S of the token; -inf where the student excludes it.
        teacher_log_prob: log P_T.
        forward_kl: KL(teacher || student) over the vocabulary.
        reverse_kl: KL(student || teacher).
        student_entropy: of the student's distribution.
        teacher_entropy: of the teacher's.
        student_top: the student's likeliest tokens, likeliest first.
        teacher_top: the teacher's.
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
        """``log P_T - log P_S``: above 0 the teacher wants more of the token, below 0 less.

        0 where both exclude the token.
        """
        if self.teacher_log_prob == self.student_log_prob:
            return 0.0
        return self.teacher_log_prob - self.student_log_prob

    def value(self, name: str) -> float:
        """One of ``VALUES``."""
        check_one_of("value", name, VALUES)
        value: float = getattr(self, name)
        return value


@dataclass(frozen=True)
class CreditRow:
    """A response.

    Attributes:
        tokens: those that were not masked out.
        caption: a line above the response.
        student_prompt: what the student read, where it is known.
        teacher_prompt: what the teacher read.
    """

    tokens: tuple[TokenCredit, ...]
    caption: str = ""
    student_prompt: str = ""
    teacher_prompt: str = ""


@dataclass(frozen=True)
class CreditMap:
    """Responses with the teacher's opinion of each token."""

    rows: tuple[CreditRow, ...]
    title: str = "Credit map"

    def to_json(self) -> str:
        """As JSON text; infinite values are the strings "inf" and "-inf", which JSON can hold."""
        return json.dumps({"format": FORMAT, **_writable(asdict(self))}, allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> "CreditMap":
        """What ``to_json`` wrote.

        Raises:
            ValueError: the text is no credit map.
        """
        remedy = "pass the text that CreditMap.to_json wrote"
        try:
            data = json.loads(text)
        except ValueError as error:
            data = error
        if not isinstance(data, dict) or data.get("format") != FORMAT:
            fail("text", "be a credit map in JSON", _short(data), remedy)
        try:
            rows = tuple(_read_row(row) for row in data["rows"])
            return cls(rows, data["title"])
        except (KeyError, TypeError, ValueError) as error:
            fail("text", "hold every field of a credit map", repr(error), remedy)
            raise

    def _repr_html_(self) -> str:
        """What a notebook shows."""
        from fused_sd.credit.html import notebook_frame

        return notebook_frame(self)


def _writable(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _writable(entry) for name, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_writable(entry) for entry in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


def _read_row(row: Mapping[str, Any]) -> CreditRow:
    tokens = tuple(_read_token(token) for token in row["tokens"])
    return CreditRow(tokens, row["caption"], row["student_prompt"], row["teacher_prompt"])


def _read_token(token: Mapping[str, Any]) -> TokenCredit:
    numbers = {
        field.name: float(token[field.name])
        for field in fields(TokenCredit)
        if field.type in (float, "float")
    }
    student_top, teacher_top = (
        tuple(TopToken(int(t["token_id"]), t["text"], float(t["prob"])) for t in token[name])
        for name in ("student_top", "teacher_top")
    )
    return TokenCredit(
        token_id=int(token["token_id"]),
        text=token["text"],
        student_top=student_top,
        teacher_top=teacher_top,
        **numbers,
    )


def _short(data: object) -> str:
    text = repr(data)
    return text if len(text) <= 60 else text[:57] + "..."
