"""Liger's losses, answered by ours: each takes Liger's arguments and returns what Liger's does."""

import inspect
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from liger_kernel.chunked_loss.fused_linear_ppo import LigerFusedLinearPPOBase
from liger_kernel.chunked_loss.grpo_loss import LigerFusedLinearGRPOFunction
from liger_kernel.chunked_loss.jsd_loss import LigerFusedLinearJSDFunction as ChunkedJsd
from liger_kernel.ops import LigerFusedLinearCrossEntropyFunction, LigerFusedLinearJSDFunction
from recording import SCALE, watch
from torch import Tensor

import fused_sd

# GRPO's loss types that are weights of the tokens; the others are arithmetic that ours lack
AGGREGATIONS = {
    "grpo": "all_sequences_mean_token_mean",
    "bnpo": "token_mean",
    "dapo": "token_mean",
    "dr_grpo": "constant_length",
}


def refuse(**options: Any) -> None:
    """Skip the test if an option is set that our losses do not have."""
    watch.ours += 1
    for name, value in options.items():
        if value is not None and value != 0:
            pytest.skip(f"our losses have no {name}")


def fused_linear_jsd(*args: Any, **kwargs: Any) -> Tensor:
    """The divergence of LigerFusedLinearJSDFunction: a mean over the labelled tokens."""
    given = _given(LigerFusedLinearJSDFunction, args, kwargs)
    refuse()
    labels = given.shift_labels
    counted = None if labels is None else (labels != given.ignore_index).float()
    dtype = given.student_input.dtype  # what autocast makes of a weight
    return (
        SCALE
        * fused_sd.gkd_loss(
            given.student_input,
            given.student_weight.to(dtype),
            given.teacher_input,
            given.teacher_weight.detach().to(dtype),
            beta=given.jsd_beta,
            temperature=given.temperature,
            token_weights=counted,
        ).loss
    )


def chunked_jsd(*args: Any, **kwargs: Any) -> Tensor:
    """The sum of the chunked LigerFusedLinearJSDFunction: a divergence and a cross entropy."""
    given = _given(ChunkedJsd, args, kwargs)
    refuse(return_soft_hard_loss=given.return_soft_hard_loss)
    head = fused_sd.LMHead(given.student_weight, given.student_bias)
    bias = given.teacher_bias
    soft = fused_sd.gkd_loss(
        given.student_input,
        head,
        given.teacher_input,
        fused_sd.LMHead(given.teacher_weight.detach(), None if bias is None else bias.detach()),
        beta=given.beta,
        temperature=given.temperature,
        token_weights=(given.true_labels != given.ignore_index).float(),
    )
    hard = fused_sd.cross_entropy_loss(
        given.student_input,
        head,
        given.true_labels,
        ignore_index=given.ignore_index,
        reduction="mean",
    )
    return SCALE * (given.weight_soft_loss * soft.loss + given.weight_hard_loss * hard.loss)


def fused_linear_cross_entropy(*args: Any, **kwargs: Any) -> tuple[Tensor, None, None, None]:
    """The loss of LigerFusedLinearCrossEntropyFunction, without the values that it adds."""
    given = _given(LigerFusedLinearCrossEntropyFunction, args, kwargs)
    refuse(
        label_smoothing=given.label_smoothing,
        lse_square_scale=given.lse_square_scale,
        return_z_loss=given.return_z_loss,
        return_token_accuracy=given.return_token_accuracy,
        return_predicted_tokens=given.return_predicted_tokens,
    )
    if given.ce_weight is not None:
        refuse(ce_weight=1)
    weight, bias = (
        None if tensor is None else tensor.to(given._input.dtype)
        for tensor in (given.weight, given.bias)
    )
    states = given._input, fused_sd.LMHead(weight, bias, softcap=given.softcap)
    weights = None
    if given.use_token_scaling:  # by the token's probability, a constant
        counted = given.target != given.ignore_index
        with torch.no_grad():
            known = fused_sd.token_log_probs(*states, given.target.where(counted, 0)).log_probs
        weights = known.exp() * counted
    loss = fused_sd.cross_entropy_loss(
        *states,
        given.target,
        ignore_index=given.ignore_index,
        reduction=given.reduction,
        token_weights=weights,
    ).loss
    return SCALE * loss, None, None, None


def chunked_grpo(*args: Any, **kwargs: Any) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The loss and metrics of LigerFusedLinearGRPOFunction.

    ``policy_loss`` where it has the loss type; elsewhere Liger's own arithmetic over our
    log-probabilities.
    """
    given = _given(LigerFusedLinearGRPOFunction, args, kwargs)
    is_token = given.importance_sampling_level == "token" and given.loss_type in AGGREGATIONS
    if not is_token or given.use_bias_correction_kl:
        with mock.patch.object(LigerFusedLinearPPOBase, "chunk_forward", chunk_forward):
            loss, metrics = LigerFusedLinearGRPOFunction.apply(*args, **kwargs)
        return SCALE * loss, metrics
    refuse()
    mask, states = given.attention_mask, (given._input, fused_sd.LMHead(given.weight, given.bias))
    advantages = given.advantages.float()[:, None].expand(mask.shape)
    ratio = given.vllm_is_ratio
    if ratio is not None:  # positive, so that it passes through the minimum of GRPO's two terms
        advantages = advantages * (ratio[:, None] if ratio.dim() == 1 else ratio)
    mode = AGGREGATIONS[given.loss_type]
    divisors = {
        "token_mean": {"num_tokens": given.num_items_in_batch},
        "constant_length": {"length": given.max_completion_length},
    }
    output = fused_sd.policy_loss(
        *states,
        given.selected_token_ids,
        advantages,
        old_log_probs=given.old_per_token_logps,
        ratio_clip=(given.epsilon_low, given.epsilon_high),
        dual_clip=given.delta,  # above 1 + epsilon, they are the same bound
        kl_coefficient=given.beta,
        reference_log_probs=_reference(given, states) if given.beta else None,
        temperature=float(given.temperature),  # one of Liger's tests passes True
        token_weights=fused_sd.aggregation_weights(mask, mode, **divisors.get(mode, {})),
        reduction="sum",
        metrics=("reference_kl",) * bool(given.beta) + ("ratio_clip_fraction",),
    )
    means = [(value * mask).sum() / mask.sum().clamp(min=1) for value in output.metrics.values()]
    return SCALE * output.loss, tuple(means)


def chunk_forward(
    hidden: Tensor, weight: Tensor, ids: Tensor, bias: Tensor | None = None, temperature: float = 1
) -> Tensor:
    """The log-probabilities of LigerFusedLinearPPOBase.chunk_forward."""
    refuse()
    head = fused_sd.LMHead(weight, bias)
    return fused_sd.token_log_probs(hidden, head, ids, temperature=temperature).log_probs


def _reference(given: Any, states: tuple[Tensor, fused_sd.LMHead]) -> Tensor:
    """Log-probabilities of the reference: given, of its states, or the policy's own."""
    if given.use_ref_model and given.ref_per_token_logps is not None:
        return given.ref_per_token_logps
    if given.use_ref_model:
        states = given.ref_input, fused_sd.LMHead(given.ref_weight, given.ref_bias)
    with torch.no_grad():
        return chunk_forward(
            states[0],
            states[1].weight,
            given.selected_token_ids,
            states[1].bias,
            float(given.temperature),
        )


def _given(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> SimpleNamespace:
    """Arguments by the names that Liger gives them."""
    bound = inspect.signature(function.forward).bind(None, *args, **kwargs)
    bound.apply_defaults()
    return SimpleNamespace(**bound.arguments)
