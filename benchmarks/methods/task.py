"""The interface between an experiment and its task: questions, verdicts, teachers' contexts."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Question:
    """A prompt with the hints that only a teacher may read.

    Attributes:
        prompt: All that the student reads.
        solution: A full response, or demonstrations.
        answer: The reference answer alone.
        response: A right response to the prompt.
    """

    prompt: str
    solution: str
    answer: str
    response: str


@dataclass(frozen=True)
class Task:
    """A model, its questions and their verifier.

    Attributes:
        name: The name of the experiment and of its files.
        questions: Disjoint questions, by part ("train", "validation", "held_out").
        base_model: Returns the folder of the model that every method starts from, given a seed and
            the cache folder.
        is_right: The verdict on a response, given prompt and response.
        is_leaking: Says whether a response mentions a hint that its prompt does not hold.
        max_response: The most tokens of a response, its end token included.
        templates: Arguments of the methods' configurations that shape the teacher's prompts.
    """

    name: str
    questions: dict[str, list[Question]]
    base_model: Callable[[int, Path], Path]
    is_right: Callable[[str, str], bool]
    is_leaking: Callable[[str], bool]
    max_response: int
    templates: dict[str, dict[str, Any]]

    def rows(self, hint: str) -> list[dict[str, str]]:
        """Return the training rows, whose privileged context is "solution" or "answer"."""
        return [
            {"prompt": question.prompt, "privileged_context": getattr(question, hint)}
            for question in self.questions["train"]
        ]

    def reward(self, prompts: list[str], completions: list[str], **_: object) -> list[float]:
        """Return the verdicts as rewards: TRL's ``reward_funcs``."""
        return [float(self.is_right(*pair)) for pair in zip(prompts, completions)]
