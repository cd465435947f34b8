"""The distillation losses that verl finds in its registry.

verl calls a loss with what the engine returned for a micro-batch.  The loss returns a value for
each response token, which verl clamps, aggregates and adds to the policy loss.

Dimension key:  B sequences, R response tokens of the longest
"""

from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor
from verl.trainer.distillation.losses import compute_forward_kl_topk
from verl.utils import tensordict_utils as tu
from verl.utils.metric import AggregationType, Metric
from verl.workers.config import ActorConfig, DistillationConfig
from verl.workers.utils.padding import no_padding_2_padding

from fused_sd.checks import fail
from fused_sd.integrations.verl import ENGINES, EVIDENCE_MIX, RLSD_LOSS, TOPK_LOSS, VENDOR
from fused_sd.integrations.verl.config import FusedSDLossConfig, require_own_config
from fused_sd.terms.surrogate import surrogate

_METRIC_KEYS = {
    "evidence": "distillation/evidence",
    "evidence_weight": "distillation/evidence_weight",
    "evidence_clip_fraction": "distillation/evidence_clip_fraction",
    "ratio_clip_fraction": "distillation/pg_clipfrac",
}


def topk_loss(
    config: ActorConfig,
    distillation_config: DistillationConfig,
    model_output: dict[str, Tensor],
    data: TensorDict,
) -> tuple[Tensor, dict[str, Any]]:
    """Return the divergence that the engine computed, with the metrics of verl's top-k loss.

    verl clamps its own forward KL at 0, which it needs because a truncated KL can be negative.
    This loss is not clamped: with a tail or renormalised it is never negative, and a clamp has no
    gradient.  If verl corrects for the rollout engine, its ``rollout_is_weights`` multiply it.

    Returns:
        (B, R) losses, and metrics.

    Raises:
        ValueError: an engine other than ours ran.  verl's engines compute a forward KL whatever
            ``loss_mode`` says, or with fused kernels no divergence at all.
    """
    require_own_config(distillation_config.distillation_loss)
    # verl's eager path also returns overlap counts, and VeOmni has a fused forward KL of its own
    is_foreign = config.strategy == "veomni" or "overlap_count" in model_output
    if is_foreign or "distillation_losses" not in model_output:
        got = "verl's own forward KL" if is_foreign else "no divergence"
        fail(
            f"loss_mode={TOPK_LOSS!r}",
            "run in fused_sd's engine, which forms the divergence",
            f"{got} from another (strategy={config.strategy!r})",
            f"set actor_rollout_ref.model.external_lib={ENGINES} (or VERL_ENGINE_VENDOR={VENDOR} "
            "where the workers run), actor_rollout_ref.model.use_fused_kernels=True and "
            f"actor_rollout_ref.model.fused_kernel_options.impl_backend={VENDOR}; "
            "python -m fused_sd.integrations.verl doctor tells what is missing",
        )
    losses = no_padding_2_padding(model_output["distillation_losses"], data)
    losses = losses * _rollout_weights(data, losses)
    _keep_a_token(data)
    has_contexts = "self_distillation_mask" in data
    _, metrics = compute_forward_kl_topk(
        config, distillation_config, model_output, _with_context(data) if has_contexts else data
    )
    if has_contexts:
        losses = torch.where(_has_context(data), losses, 0)
    return losses, metrics


def rlsd_loss(
    config: ActorConfig,
    distillation_config: DistillationConfig,
    model_output: dict[str, Tensor],
    data: TensorDict,
) -> tuple[Tensor, dict[str, Any]]:
    """Return RLSD's clipped policy surrogate, whose advantages a teacher reweights.

    The teacher's log-probabilities of the sampled tokens are the batch's ``teacher_logprobs`` (from
    a server or a worker) or, with a teacher in the engine, ``model_output["teacher_log_probs"]``.
    If verl corrects for the rollout engine, its ``rollout_is_weights`` multiply the loss, as in
    verl's policy losses.  A sample without a context has the loss of GRPO.

    Returns:
        (B, R) losses, and metrics.

    Raises:
        ValueError: the batch lacks what RLSD reads.
    """
    settings = require_own_config(distillation_config.distillation_loss)
    mask = _padded(data["response_mask"]).bool()
    log_prob = no_padding_2_padding(model_output["log_probs"], data)
    given = {
        "advantages": _padded(data["advantages"]),
        "old_log_probs": _padded(data["old_log_probs"]),
        "teacher_log_probs": _teacher_log_probs(settings, model_output, data),
    }
    # tokens outside the mask may hold NaN, which a product with 0 would not remove
    inputs = {
        name: torch.where(mask, values.detach(), 0).to(log_prob) for name, values in given.items()
    }
    inputs["mix"] = torch.ones_like(log_prob) * _evidence_mix(settings, data)
    if "self_distillation_mask" in data:
        inputs["mix"] = torch.where(_has_context(data), inputs["mix"], 0)
    current = torch.where(mask, log_prob, 0)
    term = surrogate(settings.to_surrogate(), current.detach(), inputs)
    # the surrogate's value, with its derivative w.r.t. the log-probability as gradient
    loss = term.loss + term.dlog_prob * (current - current.detach())
    loss = loss * _rollout_weights(data, loss)
    mask = _keep_a_token(data)
    logged = {key: term.metrics[name] for name, key in _METRIC_KEYS.items()}
    logged["distillation/ppo_kl"] = -term.metrics["importance_ratio"].log()
    return loss, {
        key: Metric(AggregationType.MEAN, values[mask].mean()) for key, values in logged.items()
    }


def _rollout_weights(data: TensorDict, losses: Tensor) -> Tensor | float:
    """Return verl's correction for the rollout engine (B, R), 0 outside the mask; 1 without one."""
    if "rollout_is_weights" not in data:
        return 1.0
    mask = _padded(data["response_mask"]).bool()
    return torch.where(mask, _padded(data["rollout_is_weights"]), 0).to(losses)


def _keep_a_token(data: TensorDict) -> Tensor:
    """Let verl average and log a micro-batch, or a whole batch, in which no token counts.

    Such a micro-batch is left by verl's rejection sampling, where it rejects whole samples, and by
    its padding samples.  verl takes extremes over ``response_mask``, which fails on no tokens, so
    that one token is counted.  Its loss is 0, because the losses are computed before this, and in a
    policy loss that verl adds it has no advantage.  verl also divides by the number of tokens that
    ``loss_mask`` keeps in the batch.

    Returns:
        (B, R) bool, the response mask; it is not empty.
    """
    if data["batch_num_tokens"] == 0:
        tu.assign_non_tensor(data, batch_num_tokens=1)
    mask = data["response_mask"].clone()
    tokens = (mask.values() if mask.is_nested else mask).view(-1)
    if not tokens.any() and len(tokens):
        tokens[0] = 1
        data["response_mask"] = mask
        for name in ("advantages", "ref_log_prob"):
            if name in data:
                data[name] = torch.zeros_like(data[name])
    return _padded(data["response_mask"]).bool()


def _has_context(data: TensorDict) -> Tensor:
    """Return (B, 1) bool: whether the trainer had something to show the sample's teacher."""
    return data["self_distillation_mask"][:, None] != 0


def _with_context(data: TensorDict) -> TensorDict:
    """Mask the responses without a context, unless that leaves no token.

    verl logs extremes of the masses over ``response_mask``; the minimum of no tokens is an error.
    """
    mask = _padded(data["response_mask"])
    kept = torch.where(_has_context(data), mask, 0)
    if not kept.any():
        return data
    masked = data.copy()
    masked["response_mask"] = kept
    return masked


def _evidence_mix(settings: FusedSDLossConfig, data: TensorDict) -> Tensor | float:
    """Return the evidence's share in the advantages: (B, 1) if the trainer changes it."""
    if settings.to_schedule() is None:
        return settings.rlsd_mix
    if EVIDENCE_MIX not in data:
        fail(
            "rlsd_mix_decay_steps",
            "come with a trainer of fused_sd, which knows the training step",
            f"{settings.rlsd_mix_decay_steps} and no {EVIDENCE_MIX!r} in the batch",
            "set trainer.v1.trainer_mode=fused_sd_sync, or leave the steps at 0",
        )
    mix: Tensor = data[EVIDENCE_MIX]
    return mix[:, None]


def _padded(values: Tensor) -> Tensor:
    """Return (B, R), padded with 0 behind each sequence's end."""
    return values.to_padded_tensor(0) if values.is_nested else values


def _teacher_log_probs(
    settings: FusedSDLossConfig, model_output: dict[str, Tensor], data: TensorDict
) -> Tensor:
    """Return the teacher's log-probabilities of the sampled tokens: (B, R)."""
    # teacher_logprobs come from a server, or from a worker with scored_by="worker"
    is_scored = settings.teacher == "server" or "teacher_logprobs" in data
    key = "teacher_logprobs" if is_scored else "teacher_log_probs"
    holder = data if is_scored else model_output
    if key not in holder:
        remedy = f"run in fused_sd's engine: VERL_ENGINE_VENDOR={VENDOR}"
        if settings.teacher == "server":
            remedy = (
                "set distillation.enabled=True and a teacher model, or choose another "
                "distillation_loss.teacher"
            )
        where = "the batch" if is_scored else "model_output"
        fail(
            f"{where}[{key!r}]",
            f"be there for RLSD with teacher={settings.teacher!r}",
            "nothing",
            remedy,
        )
    values = no_padding_2_padding(holder[key], data)
    if values.dim() == 3 and values.shape[-1] != 1:
        fail(
            "teacher_logprobs",
            "hold the sampled token's log-probability alone for RLSD",
            f"{values.shape[-1]} entries of each token",
            f"send one, as verl does for loss_mode={RLSD_LOSS!r}",
        )
    return values.squeeze(-1) if values.dim() == 3 else values
