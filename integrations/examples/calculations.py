"""A task for a tool: products of large numbers, and a calculator."""

import random
from collections.abc import Sequence
from typing import Any

from datasets import Dataset

from fused_sd.integrations.examples.arithmetic import feedback as feedback_on_result
from fused_sd.integrations.examples.arithmetic import reward as reward_of_result


def calculate(first: int, operator: str, second: int) -> str:
    """Calculate with two whole numbers.

    Args:
        first: The first number.
        operator: One of "+", "-" and "*".
        second: The second number.

    Returns:
        The result.
    """
    if operator == "+":
        return str(first + second)
    if operator == "-":
        return str(first - second)
    if operator == "*":
        return str(first * second)
    return f"There is no operator {operator!r}: use +, - or *."


def orders(num: int, *, seed: int = 0) -> Dataset:
    """Make a dataset of chat prompts that need two calculations, and answers."""
    rng = random.Random(seed)
    return Dataset.from_list([_question(rng) for _ in range(num)])


def _question(rng: random.Random) -> dict[str, Any]:
    price, pieces, shipping = rng.randrange(100, 1000), rng.randrange(10, 100), rng.randrange(1000)
    text = (
        f"A part costs {price} cents, and sending an order costs {shipping} cents. What do "
        f"{pieces} parts cost with sending, in cents? Use the calculator, and end with the "
        "answer as a number."
    )
    return {
        "prompt": [{"role": "user", "content": text}],
        "answer": str(price * pieces + shipping),
    }


def reward(completions: Sequence[Any], answer: Sequence[str], **_: Any) -> list[float]:
    """Return 1 where the last turn is the model's and its last number the answer, else 0."""
    return reward_of_result([_said(completion) for completion in completions], answer)


def feedback(completions: Sequence[Any], answer: Sequence[str], **_: Any) -> list[str | None]:
    """Say whether a wrong result is too small or too large, and where no tool was called."""
    results = feedback_on_result([_said(completion) for completion in completions], answer)
    return [
        f"{text} The calculator was not used." if text and len(completion) == 1 else text
        for text, completion in zip(results, completions)
    ]


def _said(completion: Sequence[dict[str, Any]]) -> str:
    """Return the model's final words: none where the conversation ends with a tool's."""
    last = completion[-1] if completion else {}
    return last.get("content") or "" if last.get("role") == "assistant" else ""
