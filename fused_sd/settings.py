"""How settings cross an operator's schema, which knows text and numbers only.

A setting is a named tuple or a frozen dataclass of plain values and other settings, registered with
``@setting``.  ``encode`` writes it as text; its numbers travel beside the text, because
``torch.compile`` may hold a number as a symbol that has no text.
"""

import ast
import dataclasses
import functools
from typing import Any, NamedTuple, TypeVar

Kind = TypeVar("Kind", bound=type)

_KINDS: dict[str, Any] = {}


class Encoded(NamedTuple):
    """A setting in the form that an operator takes."""

    text: str  # with a name in place of each number: f0, f1, ... i0, i1, ...
    floats: list[float]
    ints: list[int]


def setting(kind: Kind) -> Kind:
    """Register a named tuple or a frozen dataclass, so that its instances can be encoded."""
    known = _KINDS.setdefault(kind.__name__, kind)
    assert known.__module__ == kind.__module__, f"two settings are called {kind.__name__}"
    _KINDS[kind.__name__] = kind
    return kind


def _fields(kind: Any) -> list[str]:
    if dataclasses.is_dataclass(kind):
        return [field.name for field in dataclasses.fields(kind)]
    return list(kind._fields)


def encode(value: Any) -> Encoded:
    """Write a setting, a plain tuple or a plain value as text and numbers."""
    floats: list[float] = []
    ints: list[int] = []
    text = _text(value, floats, ints)
    # autograd would take an empty list for a list of tensors
    return Encoded(text, floats or [0.0], ints or [0])


def _text(value: Any, floats: list[float], ints: list[int]) -> str:
    if isinstance(value, float):
        floats.append(value)
        return f"f{len(floats) - 1}"
    if isinstance(value, int) and not isinstance(value, bool):
        ints.append(value)
        return f"i{len(ints) - 1}"
    if isinstance(value, tuple):
        parts = list(value)
    elif dataclasses.is_dataclass(value):
        parts = [getattr(value, name) for name in _fields(value)]
    else:
        return repr(value)
    texts = [_text(part, floats, ints) for part in parts]
    return f"{type(value).__name__}({','.join(texts)})"


def decode(text: str, floats: list[float], ints: list[int]) -> Any:
    """Rebuild the setting that ``encode`` wrote."""
    return _build(_parse(text), floats, ints)


@functools.lru_cache(maxsize=1024)
def _parse(text: str) -> ast.expr:
    return ast.parse(text, mode="eval").body


def _build(node: ast.expr, floats: list[float], ints: list[int]) -> Any:
    if isinstance(node, ast.Call):
        assert isinstance(node.func, ast.Name)
        parts = [_build(part, floats, ints) for part in node.args]
        if node.func.id == "tuple":
            return tuple(parts)
        kind = _KINDS[node.func.id]
        return kind(**dict(zip(_fields(kind), parts, strict=True)))
    if isinstance(node, ast.Name):
        numbers: list[Any] = [*floats] if node.id[0] == "f" else [*ints]
        return numbers[int(node.id[1:])]
    return ast.literal_eval(node)
