"""This library: its public functions with their defaults, and with a sparse gradient."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

import fused_sd
from fused_sd import Jsd, LossOutput
from fused_sd.bench.problem import Loss, Problem
from fused_sd.bench.providers.formulas import RENORMALIZED_TOP_K, TAIL_TOP_K
from fused_sd.bench.providers.provider import Build, Provider, make_provider
from fused_sd.engine.certificate import GradientCertificate

Sides = tuple[Tensor, Tensor, Tensor, Tensor]
Compute = Callable[[], LossOutput]
Measurable = Callable[..., Compute]  # takes a problem, and keywords for the loss


def sides(problem: Problem) -> tuple[Sides, Tensor]:
    """Return hidden states and heads of both sides, and the token weights (N,)."""
    teacher_weight = problem.teacher_weight.detach()
    given = problem.hidden, problem.weight, problem.teacher_hidden, teacher_weight
    return given, problem.mask.float()


def divergence(problem: Problem, **run: Any) -> Compute:
    both, weights = sides(problem)
    name = Jsd(0.5) if problem.objective == "jsd" else problem.objective
    return lambda: fused_sd.divergence_loss(
        *both, divergence=name, token_weights=weights, reduction="mean", **run
    )


def opsd(problem: Problem, **run: Any) -> Compute:
    both, weights = sides(problem)
    return lambda: fused_sd.opsd_loss(*both, token_weights=weights, **run)


def topk_tail(problem: Problem, **run: Any) -> Compute:
    both, weights = sides(problem)
    return lambda: fused_sd.sdpo_loss(*both, top_k=TAIL_TOP_K, token_weights=weights, **run)


def topk_renormalized(problem: Problem) -> Compute:
    both, weights = sides(problem)
    return lambda: fused_sd.sd_zero_loss(*both, top_k=RENORMALIZED_TOP_K, token_weights=weights)


def cross_entropy(problem: Problem, **run: Any) -> Compute:
    (hidden, weight, *_), weights = sides(problem)
    return lambda: fused_sd.cross_entropy_loss(
        hidden, weight, problem.token_ids, token_weights=weights, reduction="mean", **run
    )


def grpo(problem: Problem, **run: Any) -> Compute:
    (hidden, weight, *_), weights = sides(problem)
    return lambda: fused_sd.grpo_loss(
        hidden,
        weight,
        problem.token_ids,
        problem.advantages,
        old_log_probs=problem.old_log_probs,
        token_weights=weights,
        **run,
    )


def rlsd(problem: Problem, **run: Any) -> Compute:
    (hidden, weight, *teacher), weights = sides(problem)
    return lambda: fused_sd.rlsd_loss(
        hidden,
        weight,
        problem.token_ids,
        problem.advantages,
        teacher_hidden=teacher[0],
        teacher_head=teacher[1],
        old_log_probs=problem.old_log_probs,
        token_weights=weights,
        **run,
    )


def token_log_probs(problem: Problem) -> Loss:
    (hidden, weight, *_), weights = sides(problem)

    def loss() -> Tensor:
        tokens = fused_sd.token_log_probs(hidden, weight, problem.token_ids, token_weights=weights)
        return -tokens.log_probs.sum() / weights.sum()

    return loss


# objectives whose gradients reach the whole vocabulary, so that gradient="sparse" has an effect
WIDE: dict[str, Measurable] = {
    "forward_kl": divergence,
    "reverse_kl": divergence,
    "jsd": divergence,
    "opsd": opsd,
    "topk_tail": topk_tail,
    "cross_entropy": cross_entropy,
    "grpo": grpo,
    "rlsd": rlsd,
}


def _loss(objective: Measurable, **run: Any) -> Build:
    """Build the loss, without what else its function returns."""

    def build(problem: Problem) -> Loss:
        compute = objective(problem, **run)
        return lambda: compute().loss

    return build


def _sparse(name: str, note: str, objectives: dict[str, Measurable], **run: float) -> Provider:
    """Return the library as a provider with a sparse gradient, and with its certificate."""

    def certify(problem: Problem) -> GradientCertificate:
        certificate = objectives[problem.objective](problem, gradient="sparse", **run)().certificate
        assert certificate is not None
        return certificate

    builders = {key: _loss(of, gradient="sparse", **run) for key, of in objectives.items()}
    return make_provider(name, builders, note=note, certify=certify)


FUSED_SD = make_provider(
    "fused_sd",
    {name: _loss(objective) for name, objective in WIDE.items()}
    | {"topk_renormalized": _loss(topk_renormalized), "token_log_probs": token_log_probs},
    note="fp32 logits; their gradient is rounded once",
)
SPARSE = _sparse("fused_sd, sparse", "what is dropped of the gradient is within 2^-8 of it", WIDE)
# other tolerances, to measure what the choice costs
TOLERANCES = tuple(
    _sparse(
        f"fused_sd, sparse 2^-{power}",
        f"what is dropped of the gradient is within 2^-{power} of it",
        {"reverse_kl": divergence},
        tolerance=2.0**-power,
    )
    for power in (6, 10)
)
