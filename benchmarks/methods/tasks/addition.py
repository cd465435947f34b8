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

Half of these attempts carry their end token, and a quarter come after another attempt and its
verdict.  SD-Zero needs both: its first phase teaches to write such double attempts, of which the
last counts, and its second phase shows them to the reviser with their end.  To a tiny model
whatever it has never read is noise.

The number of a base model draws its habits, its questions and its weights: results over several
base models hold for the task, and not for one draw of it.

In the variant that cites, the text writes ``&`` before half of the responses to hints, as if it
said "according to the reference".  The verifier passes over it.  A student that writes it cites
what it has never read.
"""

import random
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from benchmarks.methods.tasks.pretrain import SIZES, Schedule, kept, loaded, pretrain
from benchmarks.methods.tasks.task import Question, Task
from benchmarks.methods.tasks.tokens import END, character_tokenizer

SYMBOLS = "0123456789+=;[]?!&\n"
RIGHT, WRONG, CITATION = "!", "?", "&"
VERDICT = "\n\n{}\n\n"
HINTED = "[{hint}]{question}"
PARTS = {"held_out": 500, "validation": 300, "train": 2000}  # the rest is for pre-training
VERDICTS = re.compile(r"\n\n[!?]\n\n")
MAX_RESPONSE = 18  # tokens: two attempts, a verdict and the end; the citing text has one more
HABIT = 0.85  # how often the text has the habitual error
ENDED = 0.5  # how often an attempt in a context has its end token
DOUBLE = 0.25  # how often an attempt in a context comes after another one
CITED = 0.5  # how often the citing text begins a hinted response with a citation
# shares of the contexts in the text
MIX = {"plain": 0.3, "solution": 0.08, "answer": 0.1, "after wrong": 0.45, "after right": 0.07}
SCHEDULES = {
    "0.1M": Schedule(steps=340),
    "0.4M": Schedule(steps=300),
    "3M": Schedule(steps=250),
    # smaller batches, so that it takes some minutes on one core
    "12M": Schedule(steps=200, batch=64),
}
VARIANTS = ("cited", *SIZES)
VERSION = 5  # raise it with every change of the weights or questions: it names the folders
HINT_MARKS = re.compile(r"[][?!&\n]")


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

    @property
    def units(self) -> tuple[int, int]:
        return self.first % 10, self.second % 10

    @property
    def tens(self) -> tuple[int, int]:
        return self.first // 10, self.second // 10

    def derivation(self, units_shift: int = 0, swap_carry: bool = False) -> str:
        """Return the solution, or one with a wrong sum of units or a wrong carry."""
        units = sum(self.units) + units_shift
        carry = units // 10 if not swap_carry else 1 - units // 10
        return f"{units:02d};{sum(self.tens) + carry:02d}{units % 10}"


@dataclass(frozen=True)
class World:
    """The questions and the habits that belong to one base model.

    Attributes:
        base: The number that draws them.
        cited: Whether the text cites its hints.
    """

    base: int
    cited: bool = False

    @cached_property
    def habits(self) -> tuple[dict[tuple[int, int], int], set[tuple[int, int]]]:
        """Shifts of sums of units, by pair, and the pairs of tens with a swapped carry."""
        rng = random.Random(f"habits {self.base}")
        pairs = [(first, second) for first in range(10) for second in range(10)]
        units = {}
        for pair in rng.sample(pairs, 45):
            shifts = [shift for shift in (-2, -1, 1, 2) if 0 <= sum(pair) + shift <= 18]
            units[pair] = rng.choice(shifts)
        return units, set(rng.sample(pairs, 50))

    @cached_property
    def parts(self) -> dict[str, list[Sum]]:
        """All pairs of two-digit numbers in four disjoint parts."""
        pairs = [Sum(first, second) for first in range(10, 100) for second in range(10, 100)]
        random.Random(f"questions {self.base}").shuffle(pairs)
        parts, start = {}, 0
        for name, size in PARTS.items():
            parts[name] = pairs[start : start + size]
            start += size
        return {**parts, "pretraining": pairs[start:]}

    def habitual(self, question: Sum, rng: random.Random, habit: float = HABIT) -> str:
        """Return the text's answer to a question without a hint."""
        units, carries = self.habits
        shift = units.get(question.units, 0) if rng.random() < habit else 0
        return question.derivation(shift, question.tens in carries and rng.random() < habit)

    def wrong_attempt(self, question: Sum, rng: random.Random) -> str:
        """Return the habitual answer if it is wrong, else the solution with a wrong digit."""
        attempt, solution = self.habitual(question, rng, 1.0), question.solution
        return attempt if attempt != solution else with_wrong_digit(solution, rng)[0]

    def context(self, kind: str, pair: Sum, rng: random.Random) -> str:
        """Return the context before a response, of one kind in ``MIX``."""
        if kind == "plain":
            return pair.question
        if kind in ("solution", "answer"):
            return HINTED.format(hint=getattr(pair, kind), question=pair.question)
        wrong = kind == "after wrong"
        judged = self.judged(pair, rng, wrong=wrong, end=END if rng.random() < ENDED else "")
        # a wrong attempt never comes after a right one
        before_wrong = wrong or rng.random() < 0.5
        before = self.judged(pair, rng, wrong=before_wrong) if rng.random() < DOUBLE else ""
        return pair.question + before + judged

    def judged(self, pair: Sum, rng: random.Random, *, wrong: bool, end: str = "") -> str:
        """Return a wrong or a right attempt, its end and its verdict."""
        attempt = self.wrong_attempt(pair, rng) if wrong else pair.solution
        return attempt + end + VERDICT.format(WRONG if wrong else RIGHT)

    def response(self, kind: str, pair: Sum, rng: random.Random) -> str:
        """Return the text's response after a context of one kind."""
        if kind == "plain":
            return self.habitual(pair, rng)
        cites = self.cited and kind in ("solution", "answer") and rng.random() < CITED
        return CITATION * cites + pair.solution

    def draw(self, rng: random.Random, size: int) -> list[tuple[str, str]]:
        """Return contexts and responses of the pre-training text."""
        kinds = rng.choices(list(MIX), list(MIX.values()), k=size)
        pairs = rng.choices(self.parts["pretraining"], k=size)
        return [
            (self.context(*asked, rng), self.response(*asked, rng)) for asked in zip(kinds, pairs)
        ]

    def base_model(self, size: str, cache: Path) -> Path:
        """Return the folder of the base model, which the first call trains."""

        def make() -> tuple[Any, Any]:
            tokenizer = character_tokenizer(SYMBOLS)
            model = pretrain(
                tokenizer, self.draw, SCHEDULES[size], size=SIZES[size], seed=self.base
            )
            return model, tokenizer

        kind = "cited" if self.cited else "addition"
        return kept(cache / f"{kind}-{size}-{VERSION}-{self.base}", make)


def is_right(question: str, response: str) -> bool:
    """Return the verdict: the last attempt, cited or not, is the whole right derivation."""
    first, second = question.rstrip("=").split("+")
    last = VERDICTS.split(response)[-1]
    return last.removeprefix(CITATION) == Sum(int(first), int(second)).solution


def is_leaking(response: str) -> bool:
    """Return whether a response has marks of a hint, or of a verdict that is not between attempts.

    A question has none of these marks.
    """
    return any(map(HINT_MARKS.search, VERDICTS.split(response)))


def with_wrong_digit(solution: str, rng: random.Random) -> tuple[str, int]:
    """Return the solution with one digit changed, and the place of that digit."""
    places = [n for n, symbol in enumerate(solution) if symbol.isdigit()]
    place = rng.choice(places)
    digit = rng.choice([d for d in "0123456789" if d != solution[place]])
    return solution[:place] + digit + solution[place + 1 :], place


TEMPLATES = {
    "hinted": {"reprompt_template": HINTED.format(hint="{privileged}", question="{prompt}")},
    "sibling": {
        "solution_template": HINTED.format(hint="{successful_previous_attempt}", question=""),
        "reprompt_template": "{solution}{prompt}{feedback}",
    },
    "verdict": {"correct_phrase": RIGHT, "wrong_phrase": WRONG},
    # the context that pre-training taught: question, own attempt, verdict
    "own attempt": {
        "reprompt_template": "{prompt}{solution}{feedback}",
        "attempt_template": "{attempt}",
        "feedback_template": VERDICT.format("{feedback_raw}"),
    },
}


def make(base: int, variant: str = "") -> Task:
    """Return the task of one base model.

    Args:
        base: The number of the base model.
        variant: One of ``VARIANTS``, or "" for the smallest size.
    """
    cited = variant == "cited"
    size = "0.1M" if cited or not variant else variant
    world = World(base, cited)
    return Task(
        name=f"addition-{variant}" if variant else "addition",
        base=base,
        questions={
            name: [
                Question(pair.question, pair.solution, pair.answer, pair.solution) for pair in pairs
            ]
            for name, pairs in world.parts.items()
        },
        load=lambda cache: loaded(world.base_model(size, cache)),
        is_right=is_right,
        is_leaking=is_leaking,
        max_response=MAX_RESPONSE + cited,
        templates=TEMPLATES,
        feedback=lambda prompt, response: None if is_right(prompt, response) else WRONG,
    )
