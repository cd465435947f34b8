"""Cut cross-entropy (Apple): keeps no logits, and leaves out gradients of unlikely tokens."""

import torch
from torch import Tensor

from fused_sd.bench.problem import Loss, Problem
from fused_sd.bench.providers.provider import labels, make_provider


def cross_entropy(problem: Problem) -> Loss:
    from cut_cross_entropy import linear_cross_entropy

    return lambda: linear_cross_entropy(problem.hidden, problem.weight, labels(problem))


def token_log_probs(problem: Problem) -> Loss:
    from cut_cross_entropy import linear_cross_entropy

    def loss() -> Tensor:
        operands = problem.hidden, problem.weight, labels(problem)
        return linear_cross_entropy(*operands, reduction="none").sum() / problem.mask.sum()

    return loss


def refusal(problem: Problem) -> str | None:
    """Why the kernels cannot run a problem; None: they can."""
    if problem.hidden.dtype not in (torch.float16, torch.bfloat16):
        return f"needs 16-bit hidden states for its backward, got {problem.hidden.dtype}"
    return None


CCE = make_provider(
    "cut-cross-entropy",
    {"cross_entropy": cross_entropy, "token_log_probs": token_log_probs},
    package="cut-cross-entropy",
    module="cut_cross_entropy",
    needs_gpu=True,
    refusal=refusal,
    note="fp32 logits in registers; blocks whose gradient is below eps / 32 are left out; dH and "
    "dW summed in 16 bits under locks",
)
