"""Measurements on the held-out words, the same before, during and after training."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fused_sd.credit import CreditRow
from fused_sd.demo import task
from fused_sd.demo.answers import complete, completion_credit, evaluating


@dataclass(frozen=True)
class Look:
    """One look at the student."""

    answers: list[str]  # one a held-out word
    credit: tuple[CreditRow, ...]  # of the compared words, token by token
    values: dict[str, float]  # one point of every held-out curve


class Probe:
    """Asks the held-out words.

    Args:
        tokenizer: pads on the left.
        split: the words.
        num_examples: worked examples in the teacher's context.
        max_new_tokens: length of an answer.
        num_compared: held-out words whose two distributions are compared token by token; fewer than
            all of them, since the teacher's context is long and the machine may be small.
    """

    def __init__(
        self,
        tokenizer: Any,
        split: task.Split,
        num_examples: int,
        max_new_tokens: int,
        num_compared: int = 20,
    ) -> None:
        rng = random.Random(task.SPLIT_SEED)
        self.tokenizer = tokenizer
        self.words = split.held_out
        self.contexts = [task.feedback(word, split, rng, num_examples) for word in self.words]
        self.max_new_tokens = max_new_tokens
        self.num_compared = num_compared

    def teacher_answers(self, model: Any) -> list[str]:
        """Greedy completions of the held-out words with the examples, without the adapter."""
        with evaluating(model, as_teacher=True):
            ids = complete(model, self.tokenizer, self._informed(), self.max_new_tokens)
        return self._texts(ids)

    def accuracy(self, answers: Sequence[str]) -> float:
        """Share of the held-out words answered rightly."""
        right = [task.is_right(word, said) for word, said in zip(self.words, answers)]
        return sum(right) / len(right)

    def look(self, model: Any) -> Look:
        """The student's greedy answers, and the teacher's opinion of some of them."""
        bare = [task.question(word) for word in self.words]
        compared = slice(0, self.num_compared)
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
