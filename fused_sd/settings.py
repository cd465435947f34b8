"""Settings of an operator as plain arguments and back: its schema knows text and numbers only.

A setting is a named tuple of plain values and of other settings, registered by ``setting``.
Numbers travel beside the text, since ``torch.compile`` may hold them as symbols that have no text.
"""

import ast
import functools
from typing import Any, NamedTuple, TypeVar

Kind = TypeVar("Kind", bound=type)

_KINDS: dict[str, Any] = {}


class Spec(NamedTuple):
    """A setting as an operator takes it."""

    text: str  # with a name in place of each number: f0, f1, ... i0, i1, ...
    floats: list[float]
    ints: list[int]


def setting(kind: Kind) -> Kind:
    """Register a named tuple whose instances may travel."""
    _KINDS[kind.__name__] = kind
    return kind


def encode(value: Any) -> Spec:
    """A setting, a plain tuple or a plain value for an operator."""
    floats: list[float] = []
    ints: list[int] = []
    text = _text(value, floats, ints)
    return Spec(text, floats or [0.0], ints or [0])  # autograd takes an empty list for tensors


def _text(value: Any, floats: list[float], ints: list[int]) -> str:
    if isinstance(value, tuple):
        parts = ",".join([_text(part, floats, ints) for part in value])
        return f"{type(value).__name__}({parts})"
    if isinstance(value, float):
        floats.append(value)
        return f"f{len(floats) - 1}"
    if isinstance(value, int) and not isinstance(value, bool):
        ints.append(value)
        return f"i{len(ints) - 1}"
    return repr(value)


def decode(text: str, floats: list[float], ints: list[int]) -> Any:
    """The setting that was encoded."""
    return _build(_parse(text), floats, ints)


@functools.lru_cache(maxsize=1024)
def _parse(text: str) -> ast.expr:
    return ast.parse(text, mode="eval").body


def _build(node: ast.expr, floats: list[float], ints: list[int]) -> Any:
    if isinstance(node, ast.Call):
        assert isinstance(node.func, ast.Name)
        parts = [_build(part, floats, ints) for part in node.args]
        return tuple(parts) if node.func.id == "tuple" else _KINDS[node.func.id](*parts)
    if isinstance(node, ast.Name):
        numbers: list[Any] = [*floats] if node.id[0] == "f" else [*ints]
        return numbers[int(node.id[1:])]
    return ast.literal_eval(node)
