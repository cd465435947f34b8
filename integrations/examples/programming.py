"""Small programming tasks, each with tests; programs read numbers and print a result."""

import itertools
import random
from collections.abc import Callable
from typing import Any

from datasets import Dataset

Numbers = list[int]
FORMAT = (
    "Write a Python program. It reads one line of whole numbers, separated by spaces, and prints "
    "one line: {task}. Put the program between ```python and ```."
)
NUM_TESTS = 5


def _largest_gap(numbers: Numbers) -> int:
    ordered = sorted(numbers)
    return max((high - low for low, high in itertools.pairwise(ordered)), default=0)


def _longest_rise(numbers: Numbers) -> int:
    best = run = 1
    for before, after in itertools.pairwise(numbers):
        run = run + 1 if after > before else 1
        best = max(best, run)
    return best


def _joined(numbers: Numbers) -> str:
    return " ".join(map(str, numbers))


# what to print, with a number {k} to choose, and how to compute it
TASKS: tuple[tuple[str, Callable[[Numbers, int], Any]], ...] = (
    ("the sum of those that {k} divides", lambda n, k: sum(x for x in n if x % k == 0)),
    ("how many are greater than {k}", lambda n, k: sum(x > k for x in n)),
    ("all numbers from the largest to the smallest", lambda n, k: _joined(sorted(n)[::-1])),
    (
        "every number without repetitions, in the order given",
        lambda n, k: _joined([*dict.fromkeys(n)]),
    ),
    ("the largest difference of two neighbours once they are sorted", lambda n, k: _largest_gap(n)),
    (
        "the length of the longest run in which each is greater than the one before",
        lambda n, k: _longest_rise(n),
    ),
    (
        "the numbers, each multiplied by {k}, the last one first",
        lambda n, k: _joined([k * x for x in n[::-1]]),
    ),
    (
        "the sum of the squares of the digits of all numbers, minus signs left out",
        lambda n, k: sum(int(d) ** 2 for x in n for d in str(abs(x))),
    ),
)


def programs(num: int, *, seed: int = 0) -> Dataset:
    """Make a dataset of chat prompts and ``tests``, as ``CodeVerifier`` reads them."""
    rng = random.Random(seed)
    return Dataset.from_list([_question(rng) for _ in range(num)])


def _question(rng: random.Random) -> dict[str, Any]:
    task, solve = rng.choice(TASKS)
    k = rng.randint(2, 9)
    tests = []
    for _ in range(NUM_TESTS):
        numbers = [rng.randint(-20, 20) for _ in range(rng.randint(1, 8))]
        tests.append({"stdin": _joined(numbers) + "\n", "stdout": str(solve(numbers, k))})
    text = FORMAT.format(task=task.format(k=k))
    return {"prompt": [{"role": "user", "content": text}], "tests": tests}
