"""This library, by its public functions and their defaults."""

from torch import Tensor

import fused_sd
from fused_sd import Jsd
from fused_sd.bench.problem import Loss, Problem
from fused_sd.bench.providers.formulas import RENORMALIZED_TOP_K, TAIL_TOP_K
from fused_sd.bench.providers.provider import make_provider

Sides = tuple[Tensor, Tensor, Tensor, Tensor]


def sides(problem: Problem) -> tuple[Sides, Tensor]:
    """Both sides' states and heads, and the tokens' weights (N,)."""
    teacher_weight = problem.teacher_weight.detach()
    given = problem.hidden, problem.weight, problem.teacher_hidden, teacher_weight
    return given, problem.mask.float()


def divergence(problem: Problem) -> Loss:
    both, weights = sides(problem)
    name = Jsd(0.5) if problem.objective == "jsd" else problem.objective
    return lambda: (
        fused_sd.divergence_loss(
            *both, divergence=name, token_weights=weights, reduction="mean"
        ).loss
    )


def topk_tail(problem: Problem) -> Loss:
    both, weights = sides(problem)
    return lambda: fused_sd.sdpo_loss(*both, top_k=TAIL_TOP_K, token_weights=weights).loss


def topk_renormalized(problem: Problem) -> Loss:
    both, weights = sides(problem)
    top_k = RENORMALIZED_TOP_K
    return lambda: fused_sd.sd_zero_loss(*both, top_k=top_k, token_weights=weights).loss


def cross_entropy(problem: Problem) -> Loss:
    (hidden, weight, *_), weights = sides(problem)
    return lambda: (
        fused_sd.cross_entropy_loss(
            hidden, weight, problem.token_ids, token_weights=weights, reduction="mean"
        ).loss
    )


def token_log_probs(problem: Problem) -> Loss:
    (hidden, weight, *_), weights = sides(problem)

    def loss() -> Tensor:
        tokens = fused_sd.token_log_probs(hidden, weight, problem.token_ids, token_weights=weights)
        return -tokens.log_probs.sum() / weights.sum()

    return loss


def grpo(problem: Problem) -> Loss:
    (hidden, weight, *_), weights = sides(problem)
    return lambda: (
        fused_sd.grpo_loss(
            hidden,
            weight,
            problem.token_ids,
            problem.advantages,
            old_log_probs=problem.old_log_probs,
            token_weights=weights,
        ).loss
    )


def rlsd(problem: Problem) -> Loss:
    (hidden, weight, *teacher), weights = sides(problem)
    return lambda: (
        fused_sd.rlsd_loss(
            hidden,
            weight,
            problem.token_ids,
            problem.advantages,
            teacher=(teacher[0], teacher[1]),
            old_log_probs=problem.old_log_probs,
            token_weights=weights,
        ).loss
    )


FUSED_SD = make_provider(
    "fused_sd",
    {
        "forward_kl": divergence,
        "reverse_kl": divergence,
        "jsd": divergence,
        "topk_tail": topk_tail,
        "topk_renormalized": topk_renormalized,
        "cross_entropy": cross_entropy,
        "token_log_probs": token_log_probs,
        "grpo": grpo,
        "rlsd": rlsd,
    },
    note="fp32 logits; their gradient is rounded once",
)
