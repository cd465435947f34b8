"""Settings of an operator as text and back: an operator's schema knows numbers and strings only.

A setting is a named tuple of plain values and of other settings, registered by ``setting``.  Its
text is traceable by ``torch.compile``; decoding is cached.
"""

import ast
import functools
from typing import Any, TypeVar

Kind = TypeVar("Kind", bound=type)

_KINDS: dict[str, Any] = {}


def setting(kind: Kind) -> Kind:
    """Register a named tuple whose instances may travel as text."""
    _KINDS[kind.__name__] = kind
    return kind


def encode(value: Any) -> str:
    """The text of a setting, a plain tuple or a plain value."""
    if isinstance(value, tuple):
        parts = ",".join([encode(part) for part in value])
        return f"{type(value).__name__}({parts})"
    return repr(value)


@functools.lru_cache(maxsize=1024)
def decode(text: str) -> Any:
    """The setting whose text this is."""
    return _build(ast.parse(text, mode="eval").body)


def _build(node: ast.expr) -> Any:
    if isinstance(node, ast.Call):
        assert isinstance(node.func, ast.Name)
        parts = [_build(part) for part in node.args]
        return tuple(parts) if node.func.id == "tuple" else _KINDS[node.func.id](*parts)
    return ast.literal_eval(node)
