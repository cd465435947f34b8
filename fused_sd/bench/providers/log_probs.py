"""Losses from peers that return log-probabilities of the sampled tokens, as trainers use them.

Dimension key:  M tokens that count, D hidden size, V vocabulary
"""

from collections.abc import Callable

import torch
from torch import Tensor

from fused_sd.bench.problem import Loss, Problem
from fused_sd.bench.providers import formulas
from fused_sd.bench.providers.provider import Build, kept

LogProbs = Callable[[Tensor, Tensor, Tensor], Tensor]  # (M, D), (V, D), (M,) -> (M,)


def from_log_probs(student: LogProbs, teacher: LogProbs) -> Build:
    """Build the policy losses from a peer's log-probabilities; RLSD's teacher has no gradient."""

    def build(problem: Problem) -> Loss:
        def loss() -> Tensor:
            tokens, of_teacher = kept(problem), None
            of_student = student(tokens.hidden, problem.weight, tokens.token_ids)
            if problem.objective == "rlsd":
                states, weight = tokens.teacher_hidden, problem.teacher_weight
                with torch.no_grad():
                    of_teacher = teacher(states, weight, tokens.token_ids)
            return formulas.policy(
                problem.objective, of_student, of_teacher, tokens.old_log_probs, tokens.advantages
            )

        return loss

    return build
