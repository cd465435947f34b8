"""Checks of what a caller passes, and the wording of every error.

Every message says the rule, the value and the remedy.  This module checks numbers and names,
``checks.tensors`` checks tensors.  A check that belongs to one setting or loss stands beside it.
"""

import math
import sys
import warnings
from collections.abc import Collection, Sequence, Set
from typing import NoReturn

import torch

LONGEST_VALUE = 400  # characters of a value in a message: a model's repr has pages
LARGEST_INT = 2**63 - 1  # the largest that an operator takes


def fail(argument: str, rule: str, got: object, remedy: str) -> NoReturn:
    """Raise the one kind of error that a caller sees: one line, however long the value is."""
    value = " ".join(str(got).split())
    if len(value) > LONGEST_VALUE:
        value = f"{value[:LONGEST_VALUE]}..."
    raise ValueError(f"{argument} must {rule}, got {value}; {remedy}")


def deprecated(message: str) -> None:
    """Warn of an old name, at the line outside the library that used it."""
    warnings.warn(message, DeprecationWarning, stacklevel=_level_outside())


def warn_once(message: str) -> None:
    """Warn at the line outside the library that is the first to meet this in the process."""
    # torch.compile traces no frames
    if torch.compiler.is_compiling() or message in _said:
        return
    _said.add(message)
    warnings.warn(message, UserWarning, stacklevel=_level_outside())


_said: set[str] = set()


def _level_outside() -> int:
    """Stack level, for the caller of the function that asks, of the first line outside."""
    frame, level = sys._getframe(2), 2
    while frame.f_back is not None and frame.f_globals.get("__name__", "").startswith("fused_sd."):
        frame, level = frame.f_back, level + 1
    return level


def check_number(argument: str, value: object, rule: str, ok: bool, remedy: str) -> None:
    """Refuse what is no number, or a number for which the rule does not hold."""
    if not isinstance(value, int | float) or isinstance(value, bool) or not ok:
        fail(argument, rule, repr(value), remedy)
    if isinstance(value, int):
        check_int_size(argument, value)


def check_int_size(argument: str, value: int) -> None:
    """Refuse an integer that fits no int64."""
    if abs(value) > LARGEST_INT:
        fail(argument, "lie within 64 bits", repr(value), "pass a smaller number")


def check_positive(argument: str, value: object, remedy: str = "pass 1.0 to leave it out") -> None:
    ok = isinstance(value, int | float) and 0 < value < math.inf
    check_number(argument, value, "be a finite number above 0", ok, remedy)


def check_finite(argument: str, value: object, remedy: str) -> None:
    ok = isinstance(value, int | float) and -math.inf < value < math.inf
    check_number(argument, value, "be a finite number", ok, remedy)


def check_non_negative(argument: str, value: object, remedy: str) -> None:
    ok = isinstance(value, int | float) and 0 <= value < math.inf
    check_number(argument, value, "be a finite number of at least 0", ok, remedy)


def check_unit_interval(argument: str, value: object) -> None:
    ok = isinstance(value, int | float) and 0 <= value <= 1
    check_number(argument, value, "lie in [0, 1]", ok, "it is the share of one of two parts")


def check_open_interval(argument: str, value: object, remedy: str) -> None:
    ok = isinstance(value, int | float) and 0 < value < 1
    check_number(argument, value, "lie in the open interval (0, 1)", ok, remedy)


def check_positive_int(argument: str, value: object) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        fail(argument, "be an integer of at least 1", repr(value), "pass a whole number")
    check_int_size(argument, value)


def check_whole(argument: str, value: object, remedy: str) -> None:
    """Refuse what is not an integer of at least 0."""
    ok = isinstance(value, int) and value >= 0
    check_number(argument, value, "be an integer of at least 0", ok, remedy)


def check_bool(argument: str, value: object) -> None:
    if not isinstance(value, bool):
        fail(argument, "be True or False", repr(value), "pass one of them")


def check_instance(argument: str, value: object, kind: type) -> None:
    """Refuse a value where an object of the library is needed, such as the number it holds."""
    if not isinstance(value, kind):
        name = kind.__name__
        fail(argument, f"be a fused_sd.{name}", repr(value), f"pass fused_sd.{name}(...)")


def check_one_of(argument: str, value: object, legal: Collection[str]) -> None:
    if not isinstance(value, str) or value not in legal:
        fail(
            argument, f"be one of {', '.join(map(repr, legal))}", repr(value), "choose one of them"
        )


def check_clip_pair(argument: str, pair: object) -> None:
    ok = (
        isinstance(pair, Sequence)
        and len(pair) == 2
        and all(isinstance(c, int | float) and not isinstance(c, bool) and c >= 0 for c in pair)
        and pair[0] <= 1
    )
    if not ok:
        fail(
            argument,
            "be (low, high) with 0 <= low <= 1 and high >= 0",
            repr(pair),
            "it clips to [1 - low, 1 + high]",
        )


def check_bounds(argument: str, pair: object, remedy: str) -> None:
    """Refuse what is not (lowest, highest), two finite numbers in this order."""
    rule = "be (lowest, highest), two finite numbers"
    if not isinstance(pair, tuple | list) or len(pair) != 2:
        fail(argument, rule, repr(pair), remedy)
    for bound in pair:
        check_finite(argument, bound, remedy)
    if pair[0] >= pair[1]:
        fail(argument, rule, repr(pair), remedy)


def check_backend_choice(backend: object) -> None:
    check_one_of("backend", backend, ("auto", "triton", "torch"))


def check_reduction(reduction: object) -> None:
    check_one_of("reduction", reduction, ("sum", "mean", "none"))


def check_names(argument: str, names: object) -> None:
    """Check that names are several; one string is refused, and what can be read only once."""
    if isinstance(names, str):
        fail(argument, "be a sequence of names", repr(names), f"pass ({names!r},)")
    if not isinstance(names, Sequence | Set) or not all(isinstance(name, str) for name in names):
        fail(argument, "be a sequence of names", repr(names), "pass a tuple of strings")
