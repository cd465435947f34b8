"""Two-digit addition with a visible derivation, for a model that learned some of it wrongly.

The answer to ``47+85=`` is ``12;132``: the units' sum, then the answer.  The pre-training text has
habitual errors: some sums of units are wrong, and some sums of tens have the wrong carry.  After a
hint or a verdict the text is right.  The model then knows better than it answers, which is what
self-distillation needs.  A response follows one of these contexts:

    47+85=                       the question alone, which the student reads
    [12;132]47+85=               with a solution
    [132]47+85=                  with the answer alone
    47+85=13;133 \\n\\n?\\n\\n       after an own attempt and the verdict that it is wrong
    47+85=12;132 \\n\\n!\\n\\n       ... that it is right
"""

import random
import re
from dataclasses import dataclass

from benchmarks.methods.task import Question, Task

SYMBOLS = "0123456789+=;[]?!\n"
RIGHT, WRONG = "!", "?"
VERDICT = "\n\n{}\n\n"
HINTED = "[{hint}]{question}"
SPLIT_SEED = 1234  # one split for all seeds, so that they can be compared
SIZES = {"held_out": 500, "validation": 300, "train": 2000}  # the rest is for pre-training
MAX_RESPONSE = 7  # tokens, the end token included
HABIT = 0.85  # how often the text has the habitual error
HABIT_SEED = 5
HINT_MARKS = re.compile(r"[][?!\n]")


@dataclass(frozen=True)
class Sum:
    """Two numbers to add."""

    first: int
    second: int

    @property
    def question(self) -> str:
        return f"{self.first}+{self.second}="

    @property
    def answer(self) -> str:
        return f"{self.first + self.second:03d}"

    @property
    def solution(self) -> str:
        return self.derivation()

    def derivation(self, units_shift: int = 0, swap_carry: bool = False) -> str:
        """Return the solution, or one with a wrong sum of units or a wrong carry."""
        units = self.first % 10 + self.second % 10 + units_shift
        carry = units // 10 if not swap_carry else 1 - units // 10
        tens = self.first // 10 + self.second // 10 + carry
        return f"{units:02d};{tens:02d}{units % 10}"


def _habits() -> tuple[dict[tuple[int, int], int], set[tuple[int, int]]]:
    """Return the errors of sums of units, by pair, and the pairs of tens with a swapped carry."""
    rng = random.Random(HABIT_SEED)
    pairs = [(first, second) for first in range(10) for second in range(10)]
    units = {}
    for pair in rng.sample(pairs, 45):
        shifts = [shift for shift in (-2, -1, 1, 2) if 0 <= sum(pair) + shift <= 18]
        units[pair] = rng.choice(shifts)
    return units, set(rng.sample(pairs, 50))


UNITS_HABITS, CARRY_HABITS = _habits()


def habitual(question: Sum, rng: random.Random, habit: float = HABIT) -> str:
    """Return the text's answer to a question without a hint."""
    units = (question.first % 10, question.second % 10)
    tens = (question.first // 10, question.second // 10)
    shift = UNITS_HABITS.get(units, 0) if rng.random() < habit else 0
    return question.derivation(shift, tens in CARRY_HABITS and rng.random() < habit)


def splits() -> dict[str, list[Sum]]:
    """Return all pairs of two-digit numbers in four disjoint parts."""
    pairs = [Sum(first, second) for first in range(10, 100) for second in range(10, 100)]
    random.Random(SPLIT_SEED).shuffle(pairs)
    parts, start = {}, 0
    for name, size in SIZES.items():
        parts[name] = pairs[start : start + size]
        start += size
    parts["pretraining"] = pairs[start:]
    return parts


def is_right(question: str, response: str) -> bool:
    """Return the verdict: the response is the full derivation with the right sum."""
    first, second = question.rstrip("=").split("+")
    return response == Sum(int(first), int(second)).solution


def is_leaking(response: str) -> bool:
    """Return whether a response holds marks of a hint or a verdict, as no question does."""
    return HINT_MARKS.search(response) is not None


def with_wrong_digit(solution: str, rng: random.Random) -> tuple[str, int]:
    """Return the solution with one digit changed, and the place of that digit."""
    places = [n for n, symbol in enumerate(solution) if symbol.isdigit()]
    place = rng.choice(places)
    digit = rng.choice([d for d in "0123456789" if d != solution[place]])
    return solution[:place] + digit + solution[place + 1 :], place


def wrong_attempt(question: Sum, rng: random.Random) -> str:
    """Return the habitual answer if it is wrong, else the solution with a wrong digit."""
    attempt, solution = habitual(question, rng, 1.0), question.solution
    return attempt if attempt != solution else with_wrong_digit(solution, rng)[0]


def context(kind: str, pair: Sum, rng: random.Random) -> str:
    """Return the context before a response: plain, solution, answer, after wrong or after right."""
    if kind == "plain":
        return pair.question
    if kind == "solution":
        return HINTED.format(hint=pair.solution, question=pair.question)
    if kind == "answer":
        return HINTED.format(hint=pair.answer, question=pair.question)
    if kind == "after wrong":
        return pair.question + wrong_attempt(pair, rng) + VERDICT.format(WRONG)
    return pair.question + pair.solution + VERDICT.format(RIGHT)


TEMPLATES = {
    "hinted": {"reprompt_template": HINTED.format(hint="{privileged}", question="{prompt}")},
    "sibling": {
        "solution_template": HINTED.format(hint="{successful_previous_attempt}", question=""),
        "reprompt_template": "{solution}{prompt}{feedback}",
    },
    "verdict": {"correct_phrase": RIGHT, "wrong_phrase": WRONG},
}


def addition() -> Task:
    """Return the questions of ``splits`` as a task."""
    from benchmarks.methods.pretrain import base_model

    return Task(
        name="tiny",
        questions={
            name: [
                Question(pair.question, pair.solution, pair.answer, pair.solution) for pair in parts
            ]
            for name, parts in splits().items()
        },
        base_model=base_model,
        is_right=is_right,
        is_leaking=is_leaking,
        max_response=MAX_RESPONSE,
        templates=TEMPLATES,
    )
