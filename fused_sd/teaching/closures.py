"""Whether a copied module still runs the module that it was copied from.

``deepcopy`` copies bound methods, partials and objects, and lets them refer to the copy.  A
function it does not copy: a forward or a hook that holds the student in its closure would run the
student's weights inside of the teacher, in silence.
"""

from collections.abc import Iterator
from functools import partial
from types import FunctionType, MethodType
from typing import Any

from torch import nn

HOOKS = ("_forward_pre_hooks", "_forward_hooks")


def find_foreign(module: nn.Module, other: nn.Module) -> str | None:
    """Return the name of a forward or hook of ``module`` that holds a part of ``other``, or None.

    Args:
        module: the copy.
        other: the module that it was copied from, or has the structure of.
    """
    foreign = {id(part) for part in (*other.modules(), *other.parameters())}
    foreign -= {id(part) for part in (*module.modules(), *module.parameters())}
    for path, part in module.named_modules():
        own = {"forward": vars(part).get("forward")}
        for kind in HOOKS:
            own.update({f"{kind}[{key}]": hook for key, hook in getattr(part, kind).items()})
        for name, function in own.items():
            if any(id(held) in foreign for held in _held(function, set())):
                return f"{path}.{name}".lstrip(".")
    return None


def _held(value: Any, seen: set[int]) -> Iterator[Any]:
    """Yield what a function holds: in closures, defaults, partials, methods and containers."""
    if id(value) in seen:
        return
    seen.add(id(value))
    yield value
    inner: tuple[Any, ...] = ()
    if isinstance(value, MethodType):
        inner = value.__self__, value.__func__
    elif isinstance(value, FunctionType):
        inner = *_cells(value), *(value.__defaults__ or ()), *vars(value).values()
    elif isinstance(value, dict):
        inner = tuple(value.values())
    elif isinstance(value, list | tuple | set):
        inner = tuple(value)
    elif isinstance(value, partial):
        inner = value.func, *value.args, *value.keywords.values()
    for each in inner:
        yield from _held(each, seen)


def _cells(function: FunctionType) -> list[Any]:
    """Return the values in a function's closure; a cell may be empty."""
    found = []
    for cell in function.__closure__ or ():
        try:
            found.append(cell.cell_contents)
        except ValueError:
            continue
    return found
