"""What all verifiers share: the response in a completion, the reference, and the verdicts."""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence, Sized
from dataclasses import dataclass
from typing import Any

from fused_sd.checks import fail

START_OF_THINKING, END_OF_THINKING = "<think>", "</think>"


@dataclass(frozen=True)
class Verdict:
    """What a verifier found.

    Attributes:
        reward: 1 for a right response, 0 for a wrong one; None where the reference is unusable,
            which TRL counts as no reward at all.
        feedback: what was wrong, in words for the model; None for a right response.

    Examples:
        >>> from fused_sd.integrations.verdicts import ChoiceVerifier, Verdict
        >>> ChoiceVerifier().judge("The answer is B.", "B") == Verdict(1.0, None)
        True
        >>> ChoiceVerifier().judge("The answer is B.", None).reward is None  # no reference
        True
    """

    reward: float | None
    feedback: str | None


class Verifier(ABC):
    """A reward function whose method ``feedback`` goes to a trainer as ``feedback_func``.

    Both are called on the same rollouts, which are judged once: the verdicts of the latest call are
    kept, so that a reward and its feedback never differ.

    Examples:
        >>> from fused_sd.integrations.verdicts import Verdict, Verifier
        >>> class Shorter(Verifier):
        ...     def judge(self, response, reference):
        ...         is_right = len(response) < reference
        ...         return Verdict(float(is_right), None if is_right else "Say it in fewer words.")
        >>> judge = Shorter("shorter", "limit")
        >>> judge(["Yes."], limit=[10]), judge.feedback(["By no means."], limit=[10])
        ([1.0], ['Say it in fewer words.'])
    """

    def __init__(self, name: str, column: str) -> None:
        self.__name__ = name  # TRL logs rewards under it
        self.column = column
        self._latest: dict[str, Verdict] = {}

    @abstractmethod
    def judge(self, response: str, reference: Any) -> Verdict:
        """Judge one response.

        Args:
            response: the text of the completion, without its thinking.
            reference: the value of the dataset's column in the completion's row.
        """

    def judge_all(self, pairs: Sequence[tuple[str, Any]]) -> list[Verdict]:
        """Judge pairs of a response and its reference."""
        return [self.judge(response, reference) for response, reference in pairs]

    def verdicts(self, completions: Sequence[Any], **columns: Any) -> list[Verdict]:
        """Return the verdict on each completion, text or messages.

        A row whose reference is missing (None, or NaN as pandas has it) has no verdict.

        Raises:
            ValueError: the dataset has no column of the verifier's name, or the column or
                ``judge_all`` has another number of entries than there are completions.
        """
        if self.column not in columns:
            rule = f"have a column {self.column!r}, which the verifier {self.__name__!r} reads"
            fail("dataset", rule, sorted(columns), "rename the column, or pass column=")
        references = columns[self.column]
        _check_number(f"the column {self.column!r}", references, completions)
        pairs = [(response_text(c), r) for c, r in zip(completions, references)]
        keys = [repr(pair) for pair in pairs]
        known = {key: self._latest[key] for key in keys if key in self._latest}
        unknown = {key: pair for key, pair in zip(keys, pairs) if key not in known}
        known |= {key: Verdict(None, None) for key, (_, r) in unknown.items() if _is_missing(r)}
        asked = {key: pair for key, pair in unknown.items() if key not in known}
        fresh = list(self.judge_all(list(asked.values())))
        _check_number(f"what {type(self).__name__}.judge_all returns", fresh, asked)
        self._latest = {**known, **dict(zip(asked, fresh))}
        return [self._latest[key] for key in keys]

    def __call__(self, completions: Sequence[Any], **columns: Any) -> list[float | None]:
        """Return the rewards."""
        return [verdict.reward for verdict in self.verdicts(completions, **columns)]

    def feedback(self, completions: Sequence[Any], **columns: Any) -> list[str | None]:
        """Return the feedback on each completion."""
        return [verdict.feedback for verdict in self.verdicts(completions, **columns)]


def _check_number(name: str, entries: Sized, completions: Sized) -> None:
    if len(entries) != len(completions):
        rule = f"have one entry for each of {len(completions)} completions"
        fail(name, rule, len(entries), "keep their order and leave none out")


def _is_missing(reference: Any) -> bool:
    return reference is None or (isinstance(reference, float) and math.isnan(reference))


def response_text(completion: Any) -> str:
    """Return what a completion answers: the text of its last turn, after any thinking.

    A conversation that ends with a tool's result, or in the midst of thinking, answers nothing: the
    right number may stand in either, and the model has not said it.
    """
    if not isinstance(completion, str):
        last = completion[-1] if completion else {}
        content = last.get("content") if last.get("role") == "assistant" else ""
        if isinstance(content, list):
            content = "".join(part.get("text", "") for part in content)
        completion = content or ""
    if START_OF_THINKING in completion and END_OF_THINKING not in completion:
        return ""
    return completion.rpartition(END_OF_THINKING)[2]
