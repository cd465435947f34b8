"""Checks of what a caller passes, and the wording of every error.

Every message says the rule, the value and the remedy.  This module checks numbers and names,
``checks.tensors`` checks tensors.  A check that belongs to one setting or loss stands beside it.
"""

import math
from collections.abc import Collection, Iterable, Sequence
from typing import NoReturn


def fail(argument: str, rule: str, got: object, remedy: str) -> NoReturn:
    """Raise the one kind of error that a caller sees."""
    raise ValueError(f"{argument} must {rule}, got {got}; {remedy}")


def check_number(argument: str, value: object, rule: str, ok: bool, remedy: str) -> None:
    if not isinstance(value, int | float) or isinstance(value, bool) or not ok:
        fail(argument, rule, repr(value), remedy)


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
        fail(argument, "be an integer of at least 1", repr(value), "pass the number of entries")


def check_one_of(argument: str, value: object, legal: Collection[str]) -> None:
    if value not in legal:
        fail(
            argument, f"be one of {', '.join(map(repr, legal))}", repr(value), "choose one of them"
        )


def check_support_size(name: str, k: int, vocab: int) -> None:
    if k > vocab:
        fail(
            f"{name}.k",
            f"be at most the vocabulary's {vocab}",
            k,
            "use FULL_VOCABULARY to compare every entry",
        )


def check_ratio_clip(ratio_clip: object) -> None:
    ok = (
        isinstance(ratio_clip, Sequence)
        and len(ratio_clip) == 2
        and all(isinstance(c, int | float) and c >= 0 for c in ratio_clip)
        and ratio_clip[0] <= 1
    )
    if not ok:
        fail(
            "ratio_clip",
            "be (low, high) with 0 <= low <= 1 and high >= 0",
            repr(ratio_clip),
            "the ratio is clipped to [1 - low, 1 + high]; pass None for no clip",
        )


def check_backend_choice(backend: object) -> None:
    check_one_of("backend", backend, ("auto", "triton", "torch"))


def check_reduction(reduction: object) -> None:
    check_one_of("reduction", reduction, ("sum", "mean", "none"))


def check_names(argument: str, names: object) -> None:
    """A sequence of names, which a single string is not."""
    if isinstance(names, str) or not isinstance(names, Iterable):
        fail(argument, "be a sequence of names", repr(names), f"pass ({names!r},)")
