"""What a batch of rollouts knows when the teacher's prompts are written.

Dimension key:  B sequences of this process, G generations of a prompt
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

THINKING = re.compile(r"<think>.*?</think>\s*", re.DOTALL)


@dataclass(frozen=True)
class Sibling:
    """A rollout of the same prompt."""

    index: int  # among all processes' rollouts
    text: str
    reward: float


@dataclass(frozen=True)
class Rollout:
    """One sampled completion and what is known of it.

    Attributes:
        prompt: text, or chat messages.
        prompt_ids: as the student read it, without padding.
        completion_ids: as sampled, its end included.
        text: the completion without special tokens.
        reward: the sum of the reward functions.
        privileged: the dataset row's ``privileged_context``.
        feedback: what ``feedback_func`` said of this completion.
        index: among all processes' rollouts.
        group: all completions of the prompt, this one among them, on whatever process.
    """

    prompt: Any
    prompt_ids: list[int]
    completion_ids: list[int]
    text: str
    reward: float
    privileged: str | None
    feedback: str | None
    index: int
    group: Sequence[Sibling]

    def siblings(self, *, threshold: float, successful: bool, itself: bool) -> list[Sibling]:
        """Rollouts of the group on one side of the threshold, in the order of sampling."""
        return [
            sibling
            for sibling in self.group
            if (sibling.reward >= threshold) == successful
            and (itself or sibling.index != self.index)
        ]


def without_thinking(text: str) -> str:
    """A demonstration without its ``<think>`` spans."""
    return THINKING.sub("", text).strip()


def grouped(texts: Sequence[str], rewards: Sequence[float], size: int) -> list[list[Sibling]]:
    """Groups of G consecutive rollouts, over all processes."""
    every = [Sibling(n, text, reward) for n, (text, reward) in enumerate(zip(texts, rewards))]
    return [every[start : start + size] for start in range(0, len(every), size)]
