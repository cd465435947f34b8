"""Losses of the sampled token's log-probability, and cross entropy, the simplest of them.

Dimension key:  (...) tokens, D hidden size, V vocabulary
"""

import dataclasses
from typing import Any, NamedTuple

import torch
from torch import Tensor
from typing_extensions import Unpack

from fused_sd import checks
from fused_sd.checks import tensors as tensor_checks
from fused_sd.engine.apply import States, apply_objective
from fused_sd.engine.options import LossOptions, Options
from fused_sd.head.lm_head import Head, LMHead, placed_head
from fused_sd.losses.output import LossOutput, reduce_loss
from fused_sd.losses.sides import check_teacher_states
from fused_sd.objectives.token import TokenLossObjective
from fused_sd.terms.metrics import current_names
from fused_sd.terms.surrogate import Surrogate


class TokenLoss(NamedTuple):
    """A loss of the sampled token: its settings and the tensors that it reads."""

    surrogate: Surrogate | None  # None: cross entropy
    inputs: dict[str, Tensor]  # each (...); "token_ids" among them
    metrics: tuple[str, ...]  # names that the loss can return


def cross_entropy_loss(
    hidden: Tensor,  # (..., D)
    head: Head,  # (V, D)
    token_ids: Tensor,  # (...)
    *,
    ignore_index: int = -100,
    **options: Unpack[LossOptions],
) -> LossOutput:
    """Cross entropy of given tokens: SFT, RFT, and both parts of SD-Zero's first phase.

    Args:
        hidden: states that enter lm_head.
        head: lm_head's weight, or an ``LMHead``.
        token_ids: int64 targets; those equal to ``ignore_index`` have weight 0.
        ignore_index: the id that marks a token without a target.
        **options: as in ``divergence_loss``, without teacher_temperature.  Metrics are of
            "student_log_prob", "student_entropy".

    Returns:
        Loss, token losses (nats) and metrics.

    Raises:
        ValueError: as ``token_log_probs``.

    Reference:
        SD-Zero's phase 1 (arXiv 2604.12002) is the sum of two of these: L_rev with the weights on
        the revision only, L_gen with weights on the whole assistant turn.

    Examples:
        >>> import torch, fused_sd
        >>> hidden, head = torch.randn(4, 16), torch.randn(100, 16)
        >>> labels = torch.tensor([-100, 7, 42, 7])  # no target for the prompt's token
        >>> output = fused_sd.cross_entropy_loss(hidden, head, labels, reduction="mean")
        >>> eager = torch.nn.functional.cross_entropy(hidden @ head.T, labels)
        >>> torch.allclose(output.loss, eager)
        True
    """
    tensor_checks.check_tensor("hidden", hidden)
    tensor_checks.check_leading("token_ids", token_ids, hidden.shape[:-1], "hidden")
    tensor_checks.check_integers("token_ids", token_ids)
    is_whole = isinstance(ignore_index, int)
    remedy = "-100 is the usual one"
    checks.check_number("ignore_index", ignore_index, "be an integer", is_whole, remedy)
    tensor_checks.check_device("token_ids", token_ids, hidden.device, "hidden")
    counted = token_ids != ignore_index
    chosen = Options.of("cross_entropy_loss", options)
    token_weights = chosen.token_weights
    if token_weights is None:
        token_weights = counted.to(torch.float32)
    else:
        owner = token_ids.shape, token_ids.device, "token_ids"
        tensor_checks.check_per_token("token_weights", token_weights, *owner)
        token_weights = torch.where(counted, token_weights, 0)
    loss = TokenLoss(None, {"token_ids": token_ids}, ("student_log_prob", "student_entropy"))
    weighted = dataclasses.replace(chosen, token_weights=token_weights)
    return apply_token_loss(loss, hidden, head, None, weighted)


def apply_token_loss(
    loss: TokenLoss,
    hidden: Tensor,
    head: Head,
    teacher: tuple[Tensor, Head] | None,
    options: Options,
) -> LossOutput:
    """Check what the losses of the sampled token have in common, and apply the objective."""
    lm_head = placed_head(head, "head", options.process_group)
    shape = check_tokens(hidden, lm_head, loss.inputs["token_ids"], options)
    for name, tensor in loss.inputs.items():
        if name != "token_ids":
            tensor_checks.check_per_token(name, tensor, shape, hidden.device, "hidden")
            tensor_checks.check_token_values(name, tensor, options.token_weights)
    metrics = current_names("metrics", options.metrics, loss.metrics)
    side: States | None = None
    if teacher is not None:
        side = teacher[0], placed_head(teacher[1], "teacher_head", options.process_group)
        check_teacher_states(*side, hidden, lm_head, "hidden")
    applied = apply_objective(
        TokenLossObjective(loss.surrogate, tuple(loss.inputs), tuple(metrics.values())),
        (hidden, lm_head),
        side,
        list(loss.inputs.values()),
        _run_weights(loss, options),
        options,
    )
    extras = dict(zip(metrics, applied.extras, strict=True))
    return reduce_loss(applied, applied.values[:, 0], extras, shape, options)


def _run_weights(loss: TokenLoss, options: Options) -> Tensor | None:
    """Weights that also leave out tokens that cannot contribute: without an advantage and a KL.

    Half of GRPO's groups may have equal rewards.  Where their metrics are not asked for, their
    logits are not computed.
    """
    token_weights, surrogate = options.token_weights, loss.surrogate
    if surrogate is None or surrogate.kl_coefficient or options.metrics:
        return token_weights
    has_advantage = loss.inputs["advantages"] != 0
    if token_weights is None:
        return has_advantage.to(torch.float32)
    return torch.where(has_advantage, token_weights, 0)


def check_tokens(hidden: Any, head: LMHead, token_ids: Any, options: Options) -> torch.Size:
    """Check that hidden states, ids and weights are of the same tokens; returns their shape."""
    tensor_checks.check_hidden(hidden, "hidden", head.weight, "head")
    shape, device, weights = hidden.shape[:-1], hidden.device, options.token_weights
    tensor_checks.check_token_weights(weights, shape, device, "hidden", options.reduction)
    tensor_checks.check_ids(
        "token_ids", token_ids, shape, device, head.num_tokens, weights, "hidden"
    )
    return shape
