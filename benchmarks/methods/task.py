"""What an experiment asks: questions, hints, verdicts, and how teachers read them."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PARTS = ("train", "validation", "held_out")


@dataclass(frozen=True)
class Question:
    """A prompt, and what only a teacher may see.

    Attributes:
        prompt: all that the student reads.
        solution: a full response, or a demonstration.
        answer: the reference answer alone.
        response: a right response, as it is written after the prompt.
    """

    prompt: str
    solution: str
    answer: str
    response: str


@dataclass(frozen=True)
class Task:
    """A model and its questions.

    Attributes:
        name: of the experiment and its files.
        questions: by part, one of ``PARTS``; the parts share no question.
        base_model: folder of the model that every method starts from: (seed, cache) -> path.
        is_right: the verdict: (prompt, response) -> bool.
        is_leaking: whether a response speaks of a hint that its prompt does not hold.
        max_response: tokens of a response, its end included.
        templates: settings of the methods' configurations that shape the teacher's prompts.
    """

    name: str
    questions: dict[str, list[Question]]
    base_model: Callable[[int, Path], Path]
    is_right: Callable[[str, str], bool]
    is_leaking: Callable[[str], bool]
    max_response: int
    templates: dict[str, dict[str, Any]]

    def rows(self, hint: str) -> list[dict[str, str]]:
        """Rows to train on; ``privileged_context`` is the hint: "solution" or "answer"."""
        return [
            {"prompt": asked.prompt, "privileged_context": getattr(asked, hint)}
            for asked in self.questions["train"]
        ]

    def reward(self, prompts: list[str], completions: list[str], **_: object) -> list[float]:
        """The verdicts, as TRL asks for them."""
        return [float(self.is_right(*pair)) for pair in zip(prompts, completions)]
