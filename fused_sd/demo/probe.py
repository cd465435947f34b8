"""Measure the held-out words, in the same way before, during and after training."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fused_sd.credit import CreditRow
from fused_sd.demo import task
from fused_sd.demo.answers import complete, completion_credit, evaluating

# held-out words whose tokens are compared with the teacher, whose long prompt makes that expensive
NUM_COMPARED = 20


@dataclass(frozen=True)
class Look:
    """Hold one measurement of the student."""

    answers: list[str]  # one for each held-out word
    credit: tuple[CreditRow, ...]  # one for each compared word
    values: dict[str, float]  # one point of every held-out curve


class Probe:
    """Ask the model for the plurals of the held-out words.

    Args:
        tokenizer: a tokenizer that pads on the left.
        split: the words.
        num_examples: number of worked examples in the teacher's prompt.
        max_new_tokens: the longest answer.
    """

    def __init__(
        self,
        tokenizer: Any,
        split: task.Split,
        num_examples: int,
        max_new_tokens: int,
    ) -> None:
        rng = random.Random(task.SPLIT_SEED)
        self.tokenizer = tokenizer
        self.words = split.held_out
        self.contexts = [task.feedback(word, split, rng, num_examples) for word in self.words]
        self.max_new_tokens = max_new_tokens

    def teacher_answers(self, model: Any) -> list[str]:
        """Return the answers of the model without its adapter, with the examples in its prompt."""
        with evaluating(model, as_teacher=True):
            ids = complete(model, self.tokenizer, self._informed(), self.max_new_tokens)
        return self._texts(ids)

    def accuracy(self, answers: Sequence[str]) -> float:
        """Return the share of correct answers to the held-out words."""
        right = [task.is_right(word, said) for word, said in zip(self.words, answers)]
        return sum(right) / len(right)

    def look(self, model: Any) -> Look:
        """Measure the student: all its answers, and the credit of the compared ones."""
        bare = [task.question(word) for word in self.words]
        compared = slice(0, NUM_COMPARED)
        with evaluating(model):
            ids = complete(model, self.tokenizer, bare, self.max_new_tokens)
        credit = completion_credit(
            model, self.tokenizer, bare[compared], self._informed()[compared], ids[compared]
        )
        tokens = [token for row in credit for token in row.tokens]
        answers = self._texts(ids)
        values = {
            "held-out accuracy": self.accuracy(answers),
            "held-out KL": sum(token.forward_kl for token in tokens) / len(tokens),
            "held-out entropy": sum(token.student_entropy for token in tokens) / len(tokens),
        }
        return Look(answers, credit, values)

    def _informed(self) -> list[str]:
        return [context + task.question(word) for word, context in zip(self.words, self.contexts)]

    def _texts(self, ids: Sequence[list[int]]) -> list[str]:
        return [self.tokenizer.decode(row, skip_special_tokens=True) for row in ids]
