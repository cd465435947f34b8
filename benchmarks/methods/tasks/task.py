"""The interface between an experiment and its task: questions, verdicts, teachers' contexts."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Prompt = str | list[dict[str, Any]]
"""Text, or a conversation whose parts may be images."""


@dataclass(frozen=True)
class Question:
    """A prompt with the hints that only a teacher may read.

    Attributes:
        prompt: All that the student reads, beside its images.
        solution: A full response, or demonstrations.
        answer: The reference answer alone.
        response: A right response to the prompt.
        images: The prompt's images.
        asked: The question as the verifier reads it; None: the prompt, which says all.
    """

    prompt: str
    solution: str
    answer: str
    response: str
    images: tuple[Any, ...] = ()
    asked: str | None = None

    @property
    def verified_by(self) -> str:
        """What the verifier reads beside a response."""
        return self.prompt if self.asked is None else self.asked

    @property
    def shown(self) -> Prompt:
        """What the student reads: the prompt, or a conversation where there are images."""
        if not self.images:
            return self.prompt
        parts = [{"type": "image", "image": image} for image in self.images]
        return [{"role": "user", "content": [*parts, {"type": "text", "text": self.prompt}]}]

    @property
    def row(self) -> dict[str, Any]:
        """The columns of a training row, without the hint."""
        if not self.images:
            return {"prompt": self.prompt}
        # TRL reads images beside conversations alone, and puts them before the text itself
        prompt = [{"role": "user", "content": self.prompt}]
        return {"prompt": prompt, "images": list(self.images), "asked": self.verified_by}


@dataclass(frozen=True)
class Task:
    """A base model, its questions and their verifier.

    Attributes:
        name: The task's name, a key of ``TASKS``.
        base: The number of the base model, which also draws the questions.
        questions: Disjoint questions, by part ("train", "validation", "held_out").
        load: Returns the base model in fp32 and its tokenizer or processor, given the cache folder.
        is_right: The verdict on a response, given the question as the verifier reads it, and the
            response.
        is_leaking: Says whether a response mentions a hint that its prompt does not hold.
        max_response: The most tokens of a response, its end token included.
        templates: Arguments of the methods' configurations that shape the teacher's prompts.
        feedback: What the environment says of a response, given what ``is_right`` is; None: only
            the verdict is known.
        lora_rank: The rank of the adapter that is trained; None: the whole model is.
    """

    name: str
    base: int
    questions: Mapping[str, list[Question]]
    load: Callable[[Path], tuple[Any, Any]]
    is_right: Callable[[str, str], bool]
    is_leaking: Callable[[str], bool]
    max_response: int
    templates: Mapping[str, Mapping[str, Any]]
    feedback: Callable[[str, str], str | None] | None = None
    lora_rank: int | None = None

    def rows(self, hint: str | None) -> list[dict[str, Any]]:
        """Return the training rows.

        Args:
            hint: What the privileged context is, "solution" or "answer"; None: there is none.
        """
        return [
            question.row | ({} if hint is None else {"privileged_context": getattr(question, hint)})
            for question in self.questions["train"]
        ]

    def reward(
        self,
        prompts: list[Any],
        completions: list[Any],
        asked: list[str] | None = None,
        **_: object,
    ) -> list[float]:
        """Return the verdicts as rewards: TRL's ``reward_funcs``."""
        return [float(self.is_right(*pair)) for pair in verified(prompts, completions, asked)]

    def said(
        self,
        prompts: list[Any],
        completions: list[Any],
        asked: list[str] | None = None,
        **_: object,
    ) -> list[str | None]:
        """Return what the environment says of each response: the trainers' ``feedback_func``."""
        assert self.feedback is not None
        return [self.feedback(*pair) for pair in verified(prompts, completions, asked)]


def verified(
    prompts: list[Any], completions: list[Any], asked: list[str] | None
) -> Iterator[tuple[str, str]]:
    """Yield what the verifier reads of each completion: the question and the response.

    Where prompts are conversations TRL gives completions as turns, and ``asked`` has the questions.
    """
    for question, said in zip(prompts if asked is None else asked, completions):
        yield question, said if isinstance(said, str) else said[-1]["content"]
