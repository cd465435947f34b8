"""Rollouts: sampled completions with what is known about them when teacher prompts are written.

Dimension key:  G generations of a prompt
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fused_sd.integrations.shared.texts import as_text, known_text
from fused_sd.integrations.shared.thinking import Tags, without_thinking


@dataclass(frozen=True)
class Sibling:
    """Another rollout of the same prompt, or the rollout itself."""

    index: int  # its place among the rollouts of all processes
    text: str
    reward: float  # NaN: no verdict
    answer: str | None = None  # as in Rollout


@dataclass(frozen=True)
class Rollout:
    """One sampled completion, with its prompt, reward and group.

    Attributes:
        prompt: text, or chat messages.
        prompt_ids: the prompt's tokens as the student read them, without padding.
        completion_ids: the tokens as sampled, the end token included.
        text: the completion without special tokens.
        reward: the weighted sum of the reward functions; NaN where none had a verdict.
        privileged: ``privileged_context`` of the dataset's row, as text; None where it is missing.
            A value that is no text stays as it is, and ``hint`` refuses it.
        feedback: what ``feedback_func`` returned for this completion, likewise.
        index: its place among the rollouts of all processes.
        group: all completions of the prompt, this one included, from all processes.
        observation: the last result of a tool in the completion, or None.
        example: the dataset's row.
        tools: the tools that the prompt offers.
        answer: the text behind the thoughts, empty where these were cut off; None: what the text
            alone tells of it, which shows neither the prompt's end nor special tokens.
        hint_name: what ``privileged`` is called in the dataset.
    """

    prompt: Any
    prompt_ids: list[int]
    completion_ids: list[int]
    text: str
    reward: float
    privileged: Any
    feedback: Any
    index: int
    group: Sequence[Sibling]
    observation: str | None = None
    example: Mapping[str, Any] = field(default_factory=dict)
    tools: Sequence[Any] = ()
    answer: str | None = None
    hint_name: str = "privileged_context"

    def __post_init__(self) -> None:
        # Not refused here: a method that does not read a column does not care what it holds.
        for name in ("privileged", "feedback"):
            object.__setattr__(self, name, known_text(getattr(self, name)))

    @property
    def hint(self) -> str | None:
        """The text of ``privileged``; None where it is missing or empty.

        Raises:
            ValueError: ``privileged`` is neither text nor made of texts.
        """
        return as_text(self.hint_name, self.privileged, self.row) or None

    @property
    def row(self) -> str:
        """The dataset's row by its prompt's end, for errors."""
        said = self.prompt if isinstance(self.prompt, str) else self.prompt[-1:]
        return f"the row of the prompt {' '.join(str(said).split())[-80:]!r}"

    def siblings(self, *, threshold: float, successful: bool, itself: bool) -> list[Sibling]:
        """Return the group's rollouts on one side of a reward threshold, in the order of sampling.

        A rollout without a verdict, whose reward is NaN, is on neither side.

        Args:
            threshold: the reward from which on a rollout is successful.
            successful: return the successful ones, or the others.
            itself: whether this rollout may be among them.
        """
        return [
            sibling
            for sibling in self.group
            if not math.isnan(sibling.reward)
            and (sibling.reward >= threshold) == successful
            and (itself or sibling.index != self.index)
        ]


def shown_text(said: Sibling | Rollout, *, thoughts: bool, tags: Tags | None = None) -> str:
    """Return what a teacher is shown of a completion: all of it, or what follows its thoughts.

    Args:
        thoughts: show the thoughts, too.
        tags: those around thoughts, as in ``without_thinking``.
    """
    if thoughts:
        return said.text
    return without_thinking(said.text, tags) if said.answer is None else said.answer


def grouped(
    texts: Sequence[str],
    rewards: Sequence[float],
    size: int,
    answers: Sequence[str | None] | None = None,
) -> list[list[Sibling]]:
    """Split the rollouts of all processes into groups of G consecutive ones.

    Trainers sample a prompt's G completions one after the other, possibly across two processes.

    Args:
        answers: the texts behind the thoughts; None: they are not known.
    """
    known: Sequence[str | None] = [None] * len(texts) if answers is None else answers
    rows = zip(texts, rewards, known, strict=True)
    every = [Sibling(n, *row) for n, row in enumerate(rows)]
    return [every[start : start + size] for start in range(0, len(every), size)]
