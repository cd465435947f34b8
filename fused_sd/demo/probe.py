"""Measurements on the held-out words, the same before, during and after training."""

import random
from collections.abc import Sequence
from typing import Any

from fused_sd.demo import task
from fused_sd.demo.credit import (
    TokenCredit,
    complete,
    completion_log_probs,
    evaluating,
    token_credits,
)


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

    def answers(self, model: Any, *, as_teacher: bool = False) -> list[str]:
        """Greedy completions of the held-out words, bare or (as the teacher) with examples."""
        with evaluating(model, as_teacher=as_teacher):
            ids = complete(model, self.tokenizer, self._prompts(as_teacher), self.max_new_tokens)
        return [self.tokenizer.decode(row, skip_special_tokens=True) for row in ids]

    def accuracy(self, answers: Sequence[str]) -> float:
        """Share of the held-out words answered rightly."""
        right = [task.is_right(word, said) for word, said in zip(self.words, answers)]
        return sum(right) / len(right)

    def credits(self, model: Any) -> list[list[TokenCredit]]:
        """Token credits of the student's own greedy completions of the compared words."""
        bare = self._prompts(as_teacher=False)[: self.num_compared]
        informed = self._prompts(as_teacher=True)[: self.num_compared]
        with evaluating(model):
            ids = complete(model, self.tokenizer, bare, self.max_new_tokens)
            student = completion_log_probs(model, self.tokenizer, bare, ids)
        with evaluating(model, as_teacher=True):
            teacher = completion_log_probs(model, self.tokenizer, informed, ids)
        return [token_credits(self.tokenizer, *each) for each in zip(ids, student, teacher)]

    def measure(self, model: Any) -> dict[str, float]:
        """One point of every held-out curve."""
        tokens = [token for row in self.credits(model) for token in row]
        return {
            "held-out accuracy": self.accuracy(self.answers(model)),
            "held-out KL": sum(token.kl for token in tokens) / len(tokens),
            "held-out entropy": sum(token.student_entropy for token in tokens) / len(tokens),
        }

    def _prompts(self, as_teacher: bool) -> list[str]:
        bare = [task.question(word) for word in self.words]
        if not as_teacher:
            return bare
        return [context + prompt for context, prompt in zip(self.contexts, bare)]
