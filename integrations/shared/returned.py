"""What a caller's functions return about completions: one entry for each, checked.

Reward functions, feedback functions and samplers share these rules.  An error names the function
and the completion, because it appears in the midst of a run, far from where the mistake is.
"""

import asyncio
import inspect
import math
import reprlib
from collections.abc import Iterable, Mapping, Set
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from fused_sd.checks import fail
from fused_sd.integrations.shared.texts import as_text

UNORDERED = (str, bytes, Mapping, Set)  # can be iterated over, and are no list of answers


def settled(answers: Any) -> Any:
    """Wait for answers that are not there yet, all of them or some."""

    def is_late(one: Any) -> bool:
        return isinstance(one, list) and any(map(inspect.isawaitable, one))

    async def settle() -> Any:
        known = await answers if inspect.isawaitable(answers) else answers
        if not is_late(known):
            return known
        return [await one if inspect.isawaitable(one) else one for one in known]

    if inspect.isawaitable(answers) or is_late(answers):
        # in a thread, because a notebook's own event loop runs in this one
        with ThreadPoolExecutor(1) as pool:
            return pool.submit(asyncio.run, settle()).result()
    return answers


def entries(name: str, answers: Any, number: int, *, remedy: str) -> list[Any]:
    """Return a function's answers as a list with one entry for each completion.

    Args:
        name: of the function.
        answers: what it returned: a list, tuple, array, tensor or generator, or an awaitable.
        number: of completions.
        remedy: what to do about another number of entries.

    Raises:
        ValueError: the answers have no order, or are of another number.
    """
    answers = settled(answers)
    is_scalar = getattr(answers, "ndim", None) == 0
    if is_scalar or not isinstance(answers, Iterable) or isinstance(answers, UNORDERED):
        rule, got = _rule(number), f"a {type(answers).__name__}"
        fail(name, rule, got, "put the answers into a list, in the order of the completions")
    found = list(answers)
    if len(found) != number:
        fail(name, _rule(number), len(found), remedy)
    return found


def rewards(name: str, answers: Any, number: int) -> list[float | None]:
    """Return a reward function's verdicts: numbers, and None where there is no verdict.

    NaN is no verdict either, as in TRL.  An infinite reward is an error: it has no place in the
    mean of a group, and would be a success or a failure that nobody has seen.

    Args:
        name, answers, number: as in ``entries``.

    Raises:
        ValueError: as ``entries``; or an entry is no number, or infinite.
    """
    remedy = "return None for a completion without a verdict"
    given = entries(name, answers, number, remedy=remedy)
    return [_reward(name, n, entry) for n, entry in enumerate(given)]


def texts(name: str, answers: Any, number: int) -> list[str | None]:
    """Return a feedback function's answers as texts, with None where there is nothing to say.

    Args:
        name, answers, number: as in ``entries``.

    Raises:
        ValueError: as ``entries`` and ``as_text``.
    """
    given = entries(name, answers, number, remedy="put None where there is nothing to say")
    return [as_text(name, said, f"answer {n}") for n, said in enumerate(given)]


def _rule(number: int) -> str:
    return f"return a list with one entry for each of {number} completions"


def _reward(name: str, index: int, entry: Any) -> float | None:
    if entry is None:
        return None
    got = f"{reprlib.repr(entry)} for completion {index}"
    try:
        if isinstance(entry, str | bytes):  # float() would read them
            raise TypeError
        # an element of an array or tensor, which may have a dimension of its own
        value = float(entry.item() if hasattr(entry, "item") else entry)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        fail(name, "return numbers, or None for no verdict", got, "convert it: float(...)")
    if math.isinf(value):
        fail(name, "return finite numbers", got, "bound it, or return None for no verdict")
    return None if math.isnan(value) else value
