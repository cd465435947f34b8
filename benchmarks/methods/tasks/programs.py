r"""Programs for a stack machine, for a model that is told by the interpreter what went wrong.

The answer to ``a+b*(c-d)=`` is a program such as ``abcd-*+``.  It is run on three inputs, and
the first one that fails decides what the interpreter says: ``underflow at 4``, ``unknown ( at 3``,
``2 left``, ``got 31 want 33``.  Many programs are right: names that are both operands may be
exchanged (``ba+``, ``ba\-``), and harmless words may stand anywhere.

The pre-training text has habitual errors: it takes some sums before products, swaps the operands
of some differences, forgets some operators, writes some too early, and copies some parentheses.
After a sibling's right program the text is right.  After a message alone it no longer makes the
errors that such a message can mean, but makes the others as often as without help, as somebody
does who reads the message and sees one error of several.  The contexts of a response:

    a+b*c=                          the question alone, which the student reads
    got 9 want 7\na+b*c=            with the interpreter's message on an own attempt
    <ab+c*>got 9 want 7\na+b*c=     with that attempt as well
    [abc*+]a+b*c=                   with a sibling's right program
    [abc*+]got 9 want 7\na+b*c=     with both

Harmless words (a word that does nothing, a value that is copied and dropped) are as frequent in
all contexts, with help and without, in the responses and in the programs that are shown.  No
reward and no teacher's context favours short programs: a method whose programs become shorter has
not learned that from the text.

The number of a base model draws its habits, its questions and its weights.
"""

import random
import re
from collections.abc import Collection
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

from benchmarks.methods.tasks import infix, stack
from benchmarks.methods.tasks.infix import Error, Infix
from benchmarks.methods.tasks.pretrain import SIZES, Schedule, kept, loaded, pretrain
from benchmarks.methods.tasks.stack import Fault
from benchmarks.methods.tasks.task import Question, Task
from benchmarks.methods.tasks.tokens import word_pattern, word_tokenizer

NAMES, NUM_NAMES = "abcdefgh", 5  # the names, and how many a question has
SAID = ("underflow", "overflow", "unknown ", "got ", " want ", " at ", " left")
WORDS = (*NAMES, *stack.STACK_WORDS, *"()=[]<>\n0123456789", *SAID)
SHOWN = {"sibling": "[{}]", "attempt": "<{}>", "message": "{}\n"}  # before the question
PARTS = {"held_out": 500, "validation": 300, "train": 2000, "pretraining": 20_000}
ASKED = ("held_out", "validation", "train")  # the rest is for pre-training
NUM_INPUTS = 3  # on which a program is run
MAX_RESPONSE = 32  # tokens, the end token included; the shortest programs have 10
HABIT = 0.95  # how often the text has the habitual error: a sample seldom lacks it by chance
# how many of the sites' characters are habits, by the kind of the error
HABITS = {"precedence": 8, "swapped": 22, "copied": 2, "forgotten": 2, "early": 2}
# the errors that the text no longer makes after a message
REPAIRS = {
    "underflow": {"early"},
    "left": {"forgotten"},
    "unknown": {"copied"},
    "overflow": {"precedence", "swapped", "early"},
    "value": {"precedence", "swapped", "early"},
}
# shares of the contexts in the text, by what they show
MIX = {
    (): 0.35,
    ("message",): 0.2,
    ("attempt", "message"): 0.12,
    ("sibling",): 0.18,
    ("sibling", "message"): 0.15,
}
SIZE, SCHEDULE = SIZES["0.4M"], Schedule(steps=400)
VERSION = 3  # raise it with every change of the weights or questions: it names the folders
HINT_MARKS = re.compile(r"[][<>=\n0-9]|" + "|".join(map(re.escape, SAID)))


@dataclass(frozen=True)
class World:
    """The questions and the habits that belong to one base model.

    Attributes:
        base: The number that draws them.
    """

    base: int

    @cached_property
    def habits(self) -> set[tuple[str, str]]:
        """Kinds of errors, each with the characters of the sites where the text makes it."""
        rng = random.Random(f"habits {self.base}")
        after = [sign + name for sign in "+-*" for name in NAMES]
        rng.shuffle(after)  # an operator is not both forgotten and early
        sites = {
            "precedence": [sign + name for sign in "+-" for name in NAMES],
            "swapped": [one + two for one in NAMES for two in NAMES if one != two],
            "copied": list(NAMES),
            "forgotten": after[: HABITS["forgotten"]],
            "early": after[HABITS["forgotten"] :],
        }
        return {
            (kind, site)
            for kind, count in HABITS.items()
            for site in rng.sample(sites[kind], count)
        }

    @cached_property
    def parts(self) -> dict[str, list[Infix]]:
        """Different expressions in disjoint parts."""
        rng = random.Random(f"questions {self.base}")
        drawn: dict[Infix, None] = {}
        while len(drawn) < sum(PARTS.values()):
            drawn[infix.draw(rng, NAMES, NUM_NAMES)] = None
        every = iter(drawn)
        return {name: [next(every) for _ in range(size)] for name, size in PARTS.items()}

    def errors(
        self, question: Infix, rng: random.Random, repaired: Collection[str] = ()
    ) -> set[Error]:
        """Return the errors that the text makes in a program, but for those that are repaired."""
        return {
            error
            for error, site in question.sites
            if (error[0], site) in self.habits and error[0] not in repaired and rng.random() < HABIT
        }

    def attempt(self, question: Infix, rng: random.Random) -> tuple[list[str], Fault]:
        """Return a wrong program and its fault: a habitual one, or one that lacks a word."""
        program = question.program(rng, self.errors(question, rng))
        while (found := judged(question, program)) is None:
            del program[rng.randrange(len(program))]
        return program, found

    def example(
        self, shown: tuple[str, ...], question: Infix, rng: random.Random
    ) -> tuple[str, str]:
        """Return a context that shows what ``MIX`` names, and the text's response."""
        parts, repaired = dict[str, str](), set[str]()
        if "sibling" in shown:
            parts["sibling"] = "".join(question.program(rng))
            repaired = set(infix.KINDS)
        if "message" in shown:
            own, found = self.attempt(question, rng)
            parts["message"] = found.message
            repaired |= REPAIRS[found.kind]
            if "attempt" in shown:
                parts["attempt"] = "".join(own)
        response = question.program(rng, self.errors(question, rng, repaired))
        return context(question, **parts), "".join(response)

    def draw(self, rng: random.Random, size: int) -> list[tuple[str, str]]:
        """Return contexts and responses of the pre-training text."""
        shown = rng.choices(list(MIX), list(MIX.values()), k=size)
        questions = rng.choices(self.parts["pretraining"], k=size)
        return [self.example(*asked, rng) for asked in zip(shown, questions)]

    def base_model(self, cache: Path) -> Path:
        """Return the folder of the base model, which the first call trains."""

        def make() -> tuple[Any, Any]:
            tokenizer = word_tokenizer(WORDS)
            return pretrain(tokenizer, self.draw, SCHEDULE, size=SIZE, seed=self.base), tokenizer

        return kept(cache / f"programs-{VERSION}-{self.base}", make)


def context(question: Infix, **parts: str) -> str:
    """Return what precedes a response, with those parts of ``SHOWN`` that are given."""
    shown = "".join(form.format(parts[name]) for name, form in SHOWN.items() if name in parts)
    return f"{shown}{question.text}="


@lru_cache(maxsize=50_000)
def cases(question: str) -> tuple[tuple[dict[str, int], int], ...]:
    """Return the inputs on which programs for a question are run, each with the wanted value."""
    expression, rng = Infix(question), random.Random(f"inputs {question}")
    drawn = [
        dict(zip(expression.names, rng.sample(range(2, 10), NUM_NAMES))) for _ in range(NUM_INPUTS)
    ]
    return tuple((inputs, expression.tree.value(inputs)) for inputs in drawn)


def judged(question: Infix, program: list[str]) -> Fault | None:
    """Return the fault of a program on the first inputs where it has one; None: it is right."""
    for inputs, wanted in cases(question.text):
        found = stack.fault(program, inputs, wanted)
        if found is not None:
            return found
    return None


def fault(prompt: str, response: str) -> Fault | None:
    """Return the fault of a response; None: it is right."""
    return judged(Infix(prompt.rstrip("=")), re.findall(word_pattern(WORDS), response))


def is_right(prompt: str, response: str) -> bool:
    """Return the verdict: the program computes the question's value on all inputs."""
    return fault(prompt, response) is None


def feedback(prompt: str, response: str) -> str | None:
    """Return what the interpreter says of a response; None: it is right."""
    found = fault(prompt, response)
    return None if found is None else found.message


def is_leaking(response: str) -> bool:
    """Return whether a response holds marks of a hint; a copied parenthesis is none."""
    return HINT_MARKS.search(response) is not None


TEMPLATES = {
    "sdpo": {
        "reprompt_template": "{solution}{feedback}{prompt}",
        "solution_template": SHOWN["sibling"].format("{successful_previous_attempt}"),
        "attempt_template": SHOWN["attempt"].format("{attempt}"),
        "feedback_template": SHOWN["message"].format("{feedback_raw}"),
    }
}


def asked(question: Infix) -> Question:
    """Return an expression as a question; its reference answer holds the wanted values."""
    program = "".join(question.program())
    wanted = " ".join(str(value) for _, value in cases(question.text))
    return Question(f"{question.text}=", solution=program, answer=wanted, response=program)


def make(base: int) -> Task:
    """Return the task of one base model."""
    world = World(base)
    return Task(
        name="programs",
        base=base,
        questions={
            name: list(map(asked, part)) for name, part in world.parts.items() if name in ASKED
        },
        load=lambda cache: loaded(world.base_model(cache)),
        is_right=is_right,
        is_leaking=is_leaking,
        max_response=MAX_RESPONSE,
        templates=TEMPLATES,
        feedback=feedback,
    )
