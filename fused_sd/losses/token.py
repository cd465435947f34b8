"""Losses of one log-probability for each token, and cross entropy, the simplest of them.

Dimension key:  (...) tokens, D hidden size, V vocabulary
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fused_sd import checks
from fused_sd.checks import tensors as tensor_checks
from fused_sd.engine.apply import walk
from fused_sd.engine.certificate import GradientKind
from fused_sd.engine.options import Execution, execution
from fused_sd.head.projection import LMHead, placed_head
from fused_sd.losses.output import LossOutput, Reduction, reduce_loss
from fused_sd.objectives.token import TokenLossObjective
from fused_sd.terms.surrogate import Surrogate


def cross_entropy_loss(
    hidden: Tensor,  # (..., D)
    head: Tensor | LMHead,  # (V, D)
    token_ids: Tensor,  # (...)
    *,
    token_weights: Tensor | None = None,  # (...)
    ignore_index: int = -100,
    temperature: float = 1.0,
    reduction: Reduction = "sum",
    metrics: Sequence[str] = (),
    gradient: GradientKind = "dense",
    tolerance: float | None = None,
    compact: bool = True,
    backend: str = "auto",
    chunk_size: int | None = None,
    process_group: "dist.ProcessGroup | None" = None,
    reduce_dhidden: bool = True,
) -> LossOutput:
    """Cross entropy of given tokens: SFT, RFT, and both parts of SD-Zero's first phase.

    Args:
        token_ids: int64 targets; those equal to ``ignore_index`` have weight 0.
        token_weights: weight of each token; None: ones.
        metrics: of "log_prob", "entropy".
        hidden, head, temperature, reduction, gradient, tolerance, compact, backend, chunk_size,
            process_group, reduce_dhidden: as in ``divergence_loss``.

    Returns:
        Loss, token losses (nats) and metrics.

    Raises:
        ValueError: as ``token_log_probs``.

    Reference:
        SD-Zero's phase 1 (arXiv 2604.12002) is the sum of two of these: L_rev with the weights on
        the revision only, L_gen with weights on the whole assistant turn.
    """
    tensor_checks.check_tensor("token_ids", token_ids)
    counted = token_ids != ignore_index
    if token_weights is None:
        tensor_checks.check_tensor("hidden", hidden)
        token_weights = counted.to(torch.float32)
    else:
        tensor_checks.check_leading("token_weights", token_weights, token_ids.shape, "token_ids")
        token_weights = torch.where(counted, token_weights, 0)
    return token_loss(
        hidden,
        head,
        {"token_ids": token_ids},
        None,
        None,
        token_weights,
        temperature=temperature,
        teacher_temperature=1.0,
        reduction=reduction,
        metrics=metrics,
        legal_metrics=("log_prob", "entropy"),
        execution=execution(
            gradient, tolerance, compact, backend, chunk_size, process_group, reduce_dhidden
        ),
    )


def token_loss(
    hidden: Tensor,
    head: Tensor | LMHead,
    inputs: dict[str, Tensor],
    settings: Surrogate | None,
    teacher: tuple[Tensor, Tensor | LMHead] | None,
    token_weights: Tensor | None,
    *,
    temperature: float,
    teacher_temperature: float,
    reduction: Reduction,
    metrics: Sequence[str],
    legal_metrics: tuple[str, ...],
    execution: Execution,
) -> LossOutput:
    """Check what the token losses have in common, and walk."""
    lm_head = placed_head(head, execution.process_group)
    shape = check_tokens(hidden, lm_head, inputs["token_ids"], token_weights)
    for name, tensor in inputs.items():
        if name != "token_ids":
            tensor_checks.check_per_token(name, tensor, shape, hidden.device, "hidden")
    checks.check_run(reduction, temperature)
    checks.check_positive("teacher_temperature", teacher_temperature)
    checks.check_metrics(metrics, legal_metrics)
    side = None
    if teacher is not None:
        t_hidden, t_head = teacher[0], placed_head(teacher[1], execution.process_group)
        tensor_checks.check_hidden(t_hidden, "teacher hidden", t_head.weight, "teacher head")
        tensor_checks.check_leading("teacher hidden[..., 0]", t_hidden[..., 0], shape, "hidden")
        tensor_checks.check_teacher("teacher hidden", t_hidden, hidden)
        tensor_checks.check_teacher("teacher head", t_head.weight, lm_head.weight)
        side = (t_hidden, t_head)
    walked = walk(
        TokenLossObjective(settings, tuple(inputs), tuple(metrics)),
        (hidden, lm_head),
        side,
        list(inputs.values()),
        _run_weights(settings, inputs, token_weights, metrics),
        temperature=temperature,
        teacher_temperature=teacher_temperature,
        reduced=reduction != "none",
        execution=execution,
    )
    extras = dict(zip(metrics, walked.extras, strict=True))
    token_loss = walked.values[:, 0]
    return reduce_loss(walked, token_loss, extras, token_weights, reduction, shape)


def _run_weights(
    settings: Surrogate | None,
    inputs: dict[str, Tensor],
    token_weights: Tensor | None,
    metrics: Sequence[str],
) -> Tensor | None:
    """Weights that leave out what cannot contribute: tokens without an advantage or a KL.

    Half of GRPO's groups may have equal rewards; where their metrics are not asked for, neither are
    their logits.
    """
    if settings is None or settings.kl_coefficient or metrics:
        return token_weights
    has_advantage = inputs["advantages"] != 0
    if token_weights is None:
        return has_advantage.to(torch.float32)
    return torch.where(has_advantage, token_weights, 0)


def check_tokens(
    hidden: Any, head: LMHead, token_ids: Any, token_weights: Tensor | None
) -> torch.Size:
    """Hidden states, ids and weights are of the same tokens; returns the tokens' shape."""
    tensor_checks.check_hidden(hidden, "hidden", head.weight, "head")
    shape, device = hidden.shape[:-1], hidden.device
    tensor_checks.check_per_token("token_weights", token_weights, shape, device, "hidden")
    tensor_checks.check_ids(
        "token_ids", token_ids, shape, device, head.num_tokens, token_weights, "hidden"
    )
    return shape
