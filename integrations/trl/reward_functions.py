"""Reward functions around TRL's GRPOTrainer: which are given, what they return, and advantages.

Dimension key:  N sequences of all processes, F reward functions
"""

import inspect
from collections.abc import Iterable, Mapping, Sequence, Set
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fused_sd.checks import fail
from fused_sd.integrations.shared.returned import rewards as checked_rewards


def function_list(given: Any) -> list[Any]:
    """Return ``reward_funcs`` as a new list: GRPOTrainer knows no tuples, and changes its list.

    Args:
        given: a function, a model or its name; an ordered collection of them; or None for none.

    Raises:
        ValueError: it is something else.
    """
    rule = "be a function, a model, a model's name, or a list of them"
    if given is None:
        return []
    if _is_function(given):
        return [given]
    if not isinstance(given, Iterable) or isinstance(given, Mapping | Set):
        fail("reward_funcs", rule, f"a {type(given).__name__}", "pass a list, ordered as weights")
    functions = list(given)
    for n, function in enumerate(functions):
        if not _is_function(function):
            got = f"a {type(function).__name__} in place {n}"
            fail("reward_funcs", rule, got, "pass the function itself, not what it returns")
    return functions


def check_weights(weights: Any, number: int) -> None:
    """Refuse ``reward_weights`` that are not one finite number for each of the functions."""
    if weights is None:
        return
    is_list = isinstance(weights, Sequence) and not isinstance(weights, str)
    numbers = [w for w in weights if isinstance(w, int | float)] if is_list else []
    if not is_list or len(numbers) != len(weights) or len(weights) != number:
        rule = f"be a list of numbers, one for each of {number} reward functions"
        fail("reward_weights", rule, repr(weights), "leave them out to weigh all by 1")
    if not torch.tensor(numbers).isfinite().all():
        fail(
            "reward_weights", "be finite", repr(weights), "pass 0 for a reward that is only logged"
        )


def checked(function: Any, name: str, *, has_loop: bool) -> Any:
    """Return a reward function that checks what it returns; see ``shared.returned.rewards``.

    Args:
        function: a function, or a model, which is returned as it is.
        name: under which TRL logs it.
        has_loop: whether TRL has an event loop, in which it calls coroutine functions.
    """
    if isinstance(function, nn.Module):
        return function
    named = f"the reward function {name!r}"

    def ask(*, prompts: Sequence[Any], **given: Any) -> list[float | None]:
        return checked_rewards(named, function(prompts=prompts, **given), len(prompts))

    async def ask_in_loop(*, prompts: Sequence[Any], **given: Any) -> list[float | None]:
        answers = await function(prompts=prompts, **given)
        return checked_rewards(named, answers, len(prompts))

    return ask_in_loop if has_loop and _is_async(function) else ask


def summed(given: Tensor, weights: Tensor, names: Sequence[str]) -> Tensor:
    """Return weighted sums (N,) of the rewards that are known; NaN where there is no verdict.

    Args:
        given: (N, F), NaN where a function had no verdict.
        weights: (F,).
        names: of the functions.

    Raises:
        ValueError: a sum is infinite: a reward model's output, or a reward beyond fp32.
    """
    weighted = given * weights.to(given)
    rewards = weighted.nansum(1)
    for n in (~rewards.isfinite()).nonzero()[:1, 0].tolist():
        largest = int(weighted[n].nan_to_num(nan=0.0).abs().argmax())
        got = f"{given[n, largest]:g} for completion {n} of all processes"
        rule = "give rewards that fp32 can hold"
        fail(f"the reward function {names[largest]!r}", rule, got, "bound it")
    rewards[given.isnan().all(1)] = torch.nan
    return rewards


def advantages(rewards: Tensor, size: int, scale: str, epsilon: float) -> Tensor:
    """Return advantages (N,): rewards less their group's mean, scaled by ``scale_rewards``.

    TRL's own advantages add a fixed 1e-4 to the divisor, and are 0 in groups of one.  Here a group
    of one keeps its reward.  A rollout without a verdict has advantage 0 and is in no mean.

    Args:
        rewards: (N,), NaN where there is no verdict.
        size: of a group.
        scale: ``"group"``, ``"batch"`` or ``"none"``.
        epsilon: is added to the standard deviation that rewards are divided by.
    """
    # In float64 the mean of equal rewards is that reward.  In fp32 it is off by a rounding error,
    # which is all that the deviation consists of, so that dividing by it would give noise near 1.
    groups = rewards.cpu().double().view(-1, size)
    centred = groups - groups.nanmean(1, keepdim=True) if size > 1 else groups
    if scale == "group" and size > 1:
        centred = centred / (_deviation(groups) + epsilon)
    elif scale == "batch" and rewards.numel() > 1:
        centred = centred / (_deviation(groups.view(1, -1)) + epsilon)
    return centred.flatten().nan_to_num(nan=0.0).to(rewards)


def _deviation(groups: Tensor) -> Tensor:
    """Return each row's standard deviation, without NaNs, (groups, 1)."""
    known = ~groups.isnan()
    count = known.sum(1, keepdim=True)
    squares = (groups - groups.nanmean(1, keepdim=True)).nan_to_num(nan=0.0).square()
    return (squares.sum(1, keepdim=True) / (count - 1).clamp(min=1)).sqrt()


def _is_function(given: Any) -> bool:
    return callable(given) or isinstance(given, str)


def _is_async(function: Any) -> bool:
    """Return whether TRL awaits a function: a coroutine function or an object that calls one."""
    while isinstance(function, partial):
        function = function.func
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(function.__call__)
