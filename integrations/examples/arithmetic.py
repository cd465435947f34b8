"""A task whose answers can be verified and where a hint helps: sums, with worked solutions."""

import random
import re
from collections.abc import Sequence
from typing import Any

from datasets import Dataset

NUMBER = re.compile(r"-?\d+")
SUFFIX = "Reason step by step and end with the answer as a number."


def questions(num: int, *, seed: int = 0, digits: int = 3, num_terms: int = 3) -> Dataset:
    """Make a dataset of chat prompts, worked solutions (``privileged_context``) and answers.

    Args:
        num: the number of questions.
        seed: of the random terms.
        digits: the most digits of a term.
        num_terms: the number of terms in a sum.
    """
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
    """Return 1 for a completion whose last number is the answer, else 0."""
    return [float(last_number(c) == wanted) for c, wanted in zip(completions, answer)]


def feedback(completions: Sequence[Any], answer: Sequence[str], **_: Any) -> list[str | None]:
    """Say of each wrong result whether it is too small or too large, as an environment would."""
    answers: list[str | None] = []
    for completion, wanted in zip(completions, answer):
        found = last_number(completion)
        if found is None:
            answers.append("The response holds no number.")
        elif found == wanted:
            answers.append(None)
        else:
            side = "small" if int(found) < int(wanted) else "large"
            answers.append(f"The result {found} is too {side}.")
    return answers


def last_number(completion: Any) -> str | None:
    """Return the last number of a completion, text or messages, without commas."""
    text = completion if isinstance(completion, str) else completion[-1]["content"]
    found = NUMBER.findall(text.replace(",", ""))
    return found[-1] if found else None
