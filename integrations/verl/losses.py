"""Distillation losses in verl's registry.

Each is called with what the engine returned for a micro-batch and gives the loss of each response
token, which verl clamps, aggregates and adds to the policy loss.

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
from fused_sd.integrations.verl import EVIDENCE_MIX, RLSD_LOSS, TOPK_LOSS, VENDOR
from fused_sd.integrations.verl.config import FusedSDLossConfig, settings_of
from fused_sd.terms.surrogate import Surrogate, surrogate

_LOGGED = {
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
    """The divergence that the engine formed beside the hidden states; verl's metrics of a top-k.

    It is not clamped at 0, as verl's own is: with a tail or renormalised it is never below.

    Returns:
        (B, R) losses and metrics.

    Raises:
        ValueError: another engine than ours ran, which knows one divergence alone, or none.
    """
    settings_of(distillation_config.distillation_loss)
    foreign = config.strategy == "veomni" or "overlap_count" in model_output
    if foreign or "distillation_losses" not in model_output:
        got = "verl's own forward KL" if foreign else "no divergence"
        fail(
            f"loss_mode={TOPK_LOSS!r}",
            "run in fused_sd's engine, which forms the divergence",
            f"{got} from another (strategy={config.strategy!r})",
            f"set VERL_ENGINE_VENDOR={VENDOR} in the workers' environment, "
            "actor_rollout_ref.model.use_fused_kernels=True and "
            f"actor_rollout_ref.model.fused_kernel_options.impl_backend={VENDOR}; "
            "python -m fused_sd.integrations.verl doctor tells what is missing",
        )
    counted = _taught(data) if "self_distillation_mask" in data else data
    _, metrics = compute_forward_kl_topk(config, distillation_config, model_output, counted)
    losses = no_padding_2_padding(model_output["distillation_losses"], data)
    if "self_distillation_mask" in data:
        losses = torch.where(_has_context(data), losses, 0)
        if data["batch_num_tokens"] == 0:  # no context in the whole batch: verl would divide by it
            tu.assign_non_tensor(data, batch_num_tokens=1)
    return losses, metrics


def rlsd_loss(
    config: ActorConfig,
    distillation_config: DistillationConfig,
    model_output: dict[str, Tensor],
    data: TensorDict,
) -> tuple[Tensor, dict[str, Any]]:
    """RLSD: the clipped policy surrogate whose advantages a teacher's log-probabilities reweight.

    The teacher's log-probabilities of the sampled tokens are ``teacher_logprobs`` of the batch (a
    server's, or a worker's), or with a teacher in the engine ``model_output["teacher_log_probs"]``.
    Where verl corrects for the rollout engine, its weights multiply the loss, as in verl's policy
    losses.

    Returns:
        (B, R) losses and metrics.

    Raises:
        ValueError: the batch lacks what RLSD reads.
    """
    settings = settings_of(distillation_config.distillation_loss)
    mask = _padded(data["response_mask"]).bool()
    log_prob = no_padding_2_padding(model_output["log_probs"], data)
    inputs = {
        "advantages": _padded(data["advantages"]),
        "old_log_probs": _padded(data["old_log_probs"]),
        "teacher_log_probs": _teacher_log_probs(settings, model_output, data),
    }
    # what a token outside the mask holds is not read
    known = {
        name: torch.where(mask, values.detach(), 0).to(log_prob) for name, values in inputs.items()
    }
    known["mix"] = torch.ones_like(log_prob) * _mix(settings, data)
    if "self_distillation_mask" in data:  # without a context it is GRPO
        known["mix"] = torch.where(_has_context(data), known["mix"], 0)
    now = torch.where(mask, log_prob, 0)
    term = surrogate(_surrogate(settings), now.detach(), known)
    loss = term.loss + term.dlog_prob * (now - now.detach())  # the surrogate and its derivative
    if "rollout_is_weights" in data:
        loss = loss * torch.where(mask, _padded(data["rollout_is_weights"]), 0)
    logged = {key: term.metrics[name] for name, key in _LOGGED.items()}
    logged["distillation/ppo_kl"] = -term.metrics["ratio"].log()
    return loss, {
        key: Metric(AggregationType.MEAN, values[mask].mean()) for key, values in logged.items()
    }


def _has_context(data: TensorDict) -> Tensor:
    """(B, 1) bool: whether the trainer's stage found something to show the teacher."""
    return data["self_distillation_mask"][:, None] != 0


def _taught(data: TensorDict) -> TensorDict:
    """The batch whose response mask leaves out samples without a context, if that leaves a token.

    verl takes extremes of the masses over that mask, and has none of no tokens.
    """
    mask = _padded(data["response_mask"])
    kept = torch.where(_has_context(data), mask, 0)
    if not kept.any():
        return data
    counted = data.copy()
    counted["response_mask"] = kept
    return counted


def _mix(settings: FusedSDLossConfig, data: TensorDict) -> Tensor | float:
    """The evidence's share in the advantages: (B, 1) where the trainer changes it."""
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
    """(B, R), 0 behind each sequence's end."""
    return values.to_padded_tensor(0) if values.is_nested else values


def _teacher_log_probs(
    settings: FusedSDLossConfig, model_output: dict[str, Tensor], data: TensorDict
) -> Tensor:
    """The teacher's log-probabilities of the sampled tokens: (B, R)."""
    # of a server, or where the trainer's stage let a worker score the privileged sequences
    is_scored = settings.teacher == "server" or "teacher_logprobs" in data
    key = "teacher_logprobs" if is_scored else "teacher_log_probs"
    holder = data if is_scored else model_output
    if key not in holder:
        remedies = {
            "server": "set distillation.enabled=True and a teacher model, or choose another "
            "distillation_loss.teacher",
        }
        local = f"run in fused_sd's engine: VERL_ENGINE_VENDOR={VENDOR}"
        where = "the batch" if holder is data else "model_output"
        fail(
            f"{where}[{key!r}]",
            f"be there for RLSD with teacher={settings.teacher!r}",
            "nothing",
            remedies.get(settings.teacher, local),
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


def _surrogate(settings: FusedSDLossConfig) -> Surrogate:
    evidence = settings.to_evidence()
    return Surrogate(
        ratio_clip=(settings.clip_ratio_low, settings.clip_ratio_high),
        dual_clip=settings.rlsd_dual_clip,
        evidence_clip=evidence.clip,
        evidence_from_old=evidence.log_prob == "old",
        kl_coefficient=0.0,
        kl_estimator="k3",
        importance_cap=None,
    )
