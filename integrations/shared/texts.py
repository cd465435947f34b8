"""Values of datasets and feedback functions as the texts that a teacher reads."""

import numbers
from collections.abc import Mapping, Sequence
from typing import Any

import numpy

from fused_sd.checks import fail

# by name, because pandas need not be installed, and its NA gives no truth value when compared
_MISSING = ("NAType", "NaTType", "MaskedConstant")


def as_text(argument: str, value: Any, row: str) -> str | None:
    """Return a value as text, or None where it is missing.

    None, NaN, pandas' missing values and empty containers are missing; 0 and False are not.
    Numbers are written as ``str`` writes them.  Of chat messages the contents are taken, a line
    each, as in TRL.

    Args:
        argument: what the value is called, such as its column.
        value: of a dataset's row, or what a function has returned.
        row: names the row in an error.

    Raises:
        ValueError: the value is of another kind.
    """
    text = known_text(value)
    if text is not None and not isinstance(text, str):
        fail(
            argument,
            "be text, a number, chat messages, or None where there is nothing",
            f"a {type(value).__name__} {value!r:.80} in {row}",
            "write it as text, or choose the entry of it that holds the text",
        )
    return text


def known_text(value: Any) -> Any:
    """Return a value as ``as_text`` does, but a value of another kind as it is."""
    if value is None or type(value).__name__ in _MISSING:
        return None
    if getattr(value, "ndim", None) == 0 and not isinstance(value, numpy.generic):
        value = numpy.asarray(value)[()]  # what an array or tensor without dimensions holds
    if isinstance(value, str):
        return str(value)  # numpy's strings, too
    if isinstance(value, numbers.Number | numpy.bool_):
        return str(value) if value == value else None
    if isinstance(value, numpy.datetime64 | numpy.timedelta64) and numpy.isnat(value):
        return None
    if isinstance(value, Sequence | numpy.ndarray) and not isinstance(value, bytes | bytearray):
        said = [_said(one) for one in value]
        if not any(text is None for text in said):
            return "\n".join(filter(None, said)) if said else None
    return value


def _said(message: Any) -> str | None:
    """Return the text of a chat message; None for what is none, or holds more than text."""
    if not isinstance(message, Mapping) or "content" not in message:
        return None
    content = message["content"]
    if isinstance(content, Sequence | numpy.ndarray) and not isinstance(content, str):
        if not all(isinstance(part, Mapping) and part.get("type") == "text" for part in content):
            return None
        return " ".join(part.get("text") or "" for part in content)
    text = known_text(content)
    return "" if text is None else text if isinstance(text, str) else None
