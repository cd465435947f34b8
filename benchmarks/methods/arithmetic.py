"""Two-digit addition with a visible derivation, by a model that learned some of it wrongly.

``47+85=`` is answered by ``12;132``: the units' sum, then the answer.  The text that the model is
made from errs, always at the same places: some sums of units are misremembered, some sums of tens
carry where they should not and do not where they should.  Behind a hint or a verdict the text is
right, so that the model knows better than it answers; that is what self-distillation needs.
Contexts, each read before the response:

    47+85=                       the question alone, what the student reads
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
SPLIT_SEED = 1234  # one split for every seed, so that seeds can be compared
SIZES = {"held_out": 500, "validation": 300, "train": 2000}  # pre-training has the rest
MAX_RESPONSE = 7  # tokens, the end included
HABIT = 0.85  # how often the text errs where it errs at all
HABIT_SEED = 5
HINT_MARKS = re.compile(r"[][?!\n]")


@dataclass(frozen=True)
class Sum:
    """A question."""

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
        """The solution, or one with a wrong sum of units or a wrong carry."""
        units = self.first % 10 + self.second % 10 + units_shift
        carry = units // 10 if not swap_carry else 1 - units // 10
        tens = self.first // 10 + self.second // 10 + carry
        return f"{units:02d};{tens:02d}{units % 10}"


def _habits() -> tuple[dict[tuple[int, int], int], set[tuple[int, int]]]:
    """Misremembered sums of units, with what is added to them, and tens whose carry is swapped."""
    rng = random.Random(HABIT_SEED)
    pairs = [(first, second) for first in range(10) for second in range(10)]
    units = {}
    for pair in rng.sample(pairs, 45):
        shifts = [shift for shift in (-2, -1, 1, 2) if 0 <= sum(pair) + shift <= 18]
        units[pair] = rng.choice(shifts)
    return units, set(rng.sample(pairs, 50))


UNITS_HABITS, CARRY_HABITS = _habits()


def habitual(asked: Sum, rng: random.Random, habit: float = HABIT) -> str:
    """What the text answers without a hint."""
    units = (asked.first % 10, asked.second % 10)
    tens = (asked.first // 10, asked.second // 10)
    shift = UNITS_HABITS.get(units, 0) if rng.random() < habit else 0
    return asked.derivation(shift, tens in CARRY_HABITS and rng.random() < habit)


def splits() -> dict[str, list[Sum]]:
    """All pairs of two-digit numbers in four disjoint parts."""
    pairs = [Sum(first, second) for first in range(10, 100) for second in range(10, 100)]
    random.Random(SPLIT_SEED).shuffle(pairs)
    parts, start = {}, 0
    for name, size in SIZES.items():
        parts[name] = pairs[start : start + size]
        start += size
    parts["pretraining"] = pairs[start:]
    return parts


def is_right(question: str, response: str) -> bool:
    """The verdict: the response is the derivation, and the answer the sum."""
    first, second = question.rstrip("=").split("+")
    return response == Sum(int(first), int(second)).solution


def is_leaking(response: str) -> bool:
    """Whether a response speaks of a hint or a verdict that its question does not have."""
    return HINT_MARKS.search(response) is not None


def with_wrong_digit(solution: str, rng: random.Random) -> tuple[str, int]:
    """The solution with one other digit, and where."""
    places = [n for n, symbol in enumerate(solution) if symbol.isdigit()]
    place = rng.choice(places)
    digit = rng.choice([d for d in "0123456789" if d != solution[place]])
    return solution[:place] + digit + solution[place + 1 :], place


def wrong_attempt(asked: Sum, rng: random.Random) -> str:
    """A wrong answer: the habitual one where that is wrong, else a slip."""
    attempt = habitual(asked, rng, 1.0)
    return attempt if attempt != asked.solution else with_wrong_digit(asked.solution, rng)[0]


CONTEXTS = ("plain", "solution", "answer", "after wrong", "after right")


def context(kind: str, asked: Sum, rng: random.Random) -> str:
    """What is read before the response, one of ``CONTEXTS``."""
    if kind == "plain":
        return asked.question
    if kind == "solution":
        return HINTED.format(hint=asked.solution, question=asked.question)
    if kind == "answer":
        return HINTED.format(hint=asked.answer, question=asked.question)
    if kind == "after wrong":
        return asked.question + wrong_attempt(asked, rng) + VERDICT.format(WRONG)
    return asked.question + asked.solution + VERDICT.format(RIGHT)


TEMPLATES = {
    "hinted": {"reprompt_template": HINTED.format(hint="{privileged}", question="{prompt}")},
    "sibling": {
        "solution_template": HINTED.format(hint="{successful_previous_attempt}", question=""),
        "reprompt_template": "{solution}{prompt}{feedback}",
    },
    "verdict": {"correct_phrase": RIGHT, "wrong_phrase": WRONG},
}


def addition() -> Task:
    """The questions of ``splits`` as a task."""
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
