"""A verifiable task in which a hint helps: sums, with their worked solution as the reference."""

import random
import re
from collections.abc import Sequence
from typing import Any

from datasets import Dataset

NUMBER = re.compile(r"-?\d+")
SUFFIX = "Reason step by step and end with the answer as a number."


def questions(num: int, *, seed: int = 0, digits: int = 3, num_terms: int = 3) -> Dataset:
    """Chat prompts, their worked solutions (``privileged_context``) and answers."""
    rng = random.Random(seed)
    rows = [[rng.randrange(10**digits) for _ in range(num_terms)] for _ in range(num)]
    return Dataset.from_list([_question(terms) for terms in rows])


def _question(terms: Sequence[int]) -> dict[str, Any]:
    steps, total = [], terms[0]
    for term in terms[1:]:
        steps.append(f"{total} + {term} = {total + term}.")
        total += term
    text = f"What is {' + '.join(map(str, terms))}? {SUFFIX}"
    return {
        "prompt": [{"role": "user", "content": text}],
        "privileged_context": " ".join([*steps, f"The answer is {total}."]),
        "answer": str(total),
    }


def reward(completions: Sequence[Any], answer: Sequence[str], **_: Any) -> list[float]:
    """1 where the last number is the answer."""
    return [float(_last_number(c) == wanted) for c, wanted in zip(completions, answer)]


def feedback(completions: Sequence[Any], answer: Sequence[str], **_: Any) -> list[str | None]:
    """What an environment would say: whether the result is too small or too large."""
    said: list[str | None] = []
    for completion, wanted in zip(completions, answer):
        found = _last_number(completion)
        if found is None:
            said.append("The response holds no number.")
        elif found == wanted:
            said.append(None)
        else:
            side = "small" if int(found) < int(wanted) else "large"
            said.append(f"The result {found} is too {side}.")
    return said


def _last_number(completion: Any) -> str | None:
    text = completion if isinstance(completion, str) else completion[-1]["content"]
    found = NUMBER.findall(text.replace(",", ""))
    return found[-1] if found else None
