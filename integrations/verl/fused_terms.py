"""What the engines compute of each token where verl takes logits: divergence, masses, log-prob.

Dimension key:  N tokens, D and D' hidden sizes, V and V' vocabularies, K a server's entries
"""

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from verl.workers.config import DistillationLossConfig

from fused_sd import (
    FULL_VOCABULARY,
    ImportanceCap,
    LMHead,
    checks,
    divergence_loss,
    entry_log_probs,
    token_log_probs,
    topk_divergence_loss,
)
from fused_sd.integrations.verl import RLSD_LOSS, TOPK_LOSS
from fused_sd.integrations.verl.config import settings_of

VERL_TOPK_LOSS = "forward_kl_topk"
MASSES = ("student_mass", "teacher_mass")


def fused_terms(
    hidden: Tensor,  # (N, D)
    head: Tensor | LMHead,  # (V, D)
    token_ids: Tensor,  # (N,)
    *,
    loss_config: DistillationLossConfig | None = None,
    teacher_token_ids: Tensor | None = None,  # (N, K)
    teacher_log_probs: Tensor | None = None,  # (N, K)
    teacher: tuple[Tensor, Tensor | LMHead] | None = None,  # (N, D') and (V', D')
    old_log_probs: Tensor | None = None,  # (N,)
    token_weights: Tensor | None = None,  # (N,)
    temperature: float = 1.0,
    log_probs: bool = True,
    entropy: bool = False,
    process_group: "dist.ProcessGroup | None" = None,
    reduce_dhidden: bool = True,
) -> dict[str, Tensor]:
    """What verl's model output holds of each token, from the states that enter lm_head.

    Args:
        hidden, head: the student's states at the rows that predict ``token_ids``, and its lm_head.
        token_ids: int64, the next tokens.
        loss_config: ``distillation_config.distillation_loss``, with loss_mode ``"fused_sd_topk"``
            or verl's own ``"forward_kl_topk"``, whose values it then has.  None: no divergence.
        teacher_token_ids, teacher_log_probs: integers and nats, verl's teacher server's top-k at
            the same rows, at temperature 1,
        teacher: or states and head of a teacher in this process, without gradient.
        old_log_probs: of ``token_ids`` when they were sampled, for ``importance_cap``.
        token_weights: 0 where a token does not count: its row may hold anything, its terms are 0.
        temperature: divides the student's logits, and a teacher's in this process.
        log_probs, entropy: whether they are wanted.
        process_group, reduce_dhidden: as in ``fused_sd.divergence_loss``.

    Returns:
        Those asked for, (N,), fp32 (fp64 for fp64 states): differentiable and not weighted
        ``distillation_losses``, ``log_probs`` and ``entropy``; detached ``student_mass`` and
        ``teacher_mass`` on the support.

    Raises:
        ValueError: a server sent other than topk entries, or what the settings need is missing.
    """
    run: dict[str, Any] = {
        "token_weights": None if token_weights is None else (token_weights != 0).float(),
        "temperature": temperature,
        "process_group": process_group,
        "reduce_dhidden": reduce_dhidden,
    }
    terms: dict[str, Tensor] = {}
    if loss_config is not None:
        run["backend"] = loss_config.get("backend", "auto")
        run["chunk_size"] = loss_config.get("chunk_size")
        given = Given(token_ids, teacher_token_ids, teacher_log_probs, teacher, old_log_probs)
        terms = _teacher_terms(loss_config, hidden, head, given, run)
    if log_probs or entropy:
        sampled = token_log_probs(hidden, head, token_ids, entropy=entropy, **run)
        if log_probs:
            terms["log_probs"] = sampled.log_probs
        if sampled.entropy is not None:
            terms["entropy"] = sampled.entropy
    return terms


def server_settings(loss_config: DistillationLossConfig) -> dict[str, Any]:
    """Keywords of ``topk_divergence_loss`` for a loss on a server's top-k."""
    if loss_config.loss_mode == VERL_TOPK_LOSS:
        return {"divergence": "forward_kl", "remainder": "drop"}
    return settings_of(loss_config).to_settings()


class Given(NamedTuple):
    """What a micro-batch holds beside the student's states."""

    token_ids: Tensor
    teacher_token_ids: Tensor | None
    teacher_log_probs: Tensor | None
    teacher: tuple[Tensor, Tensor | LMHead] | None
    old_log_probs: Tensor | None


def _teacher_terms(
    loss_config: DistillationLossConfig,
    hidden: Tensor,
    head: Tensor | LMHead,
    given: Given,
    run: dict[str, Any],
) -> dict[str, Tensor]:
    """What the teacher's distributions, or its log-probability of the token, are needed for."""
    if loss_config.loss_mode == RLSD_LOSS:
        assert given.teacher is not None
        states, teacher_head = given.teacher
        with torch.no_grad():
            known = token_log_probs(states, teacher_head, given.token_ids, **run)
        return {"teacher_log_probs": known.log_probs}
    if given.teacher is not None:
        support = settings_of(loss_config).to_support()
        states, teacher_head = given.teacher
        output = divergence_loss(
            hidden,
            head,
            states,
            teacher_head,
            support=support,
            reduction="none",
            metrics=() if support is FULL_VOCABULARY else MASSES,
            **settings_of(loss_config).to_settings(),
            **_importance(loss_config, given),
            **run,
        )
        whole = _counted(output.token_loss, run["token_weights"])
        masses = output.metrics or dict.fromkeys(MASSES, whole)
        return {"distillation_losses": output.loss, **masses}
    ids, log_probs = given.teacher_token_ids, given.teacher_log_probs
    if ids is None or log_probs is None:
        checks.fail(
            "teacher",
            f"be there for loss_mode={loss_config.loss_mode!r}",
            "neither teacher_ids and teacher_logprobs in the batch nor a teacher in the engine",
            "set distillation.enabled=True and a teacher model, or distillation_loss.teacher",
        )
    assert ids is not None
    assert log_probs is not None
    if loss_config.loss_mode == TOPK_LOSS:
        _check_topk(loss_config.topk, ids)
    elif loss_config.log_prob_min_clamp is not None:
        return _clamped(loss_config.log_prob_min_clamp, hidden, head, ids, log_probs, run)
    output = topk_divergence_loss(
        hidden,
        head,
        ids,
        log_probs,
        reduction="none",
        metrics=MASSES,
        **server_settings(loss_config),
        **_importance(loss_config, given),
        **run,
    )
    return {"distillation_losses": output.loss, **output.metrics}


def _importance(loss_config: DistillationLossConfig, given: Given) -> dict[str, Any]:
    cap = loss_config.get("importance_cap")
    if cap is None:
        return {}
    if given.old_log_probs is None:
        checks.fail(
            "importance_cap",
            "come with old_log_probs in the batch",
            cap,
            "let verl compute them, or pass importance_cap=null",
        )
    assert given.old_log_probs is not None
    importance = ImportanceCap(given.old_log_probs.detach(), cap)
    return {"importance": importance, "token_ids": given.token_ids}


def _check_topk(topk: int | None, teacher_token_ids: Tensor) -> None:
    got = teacher_token_ids.shape[-1]
    if got != topk:
        checks.fail(
            "teacher_ids",
            f"hold the {topk} entries of distillation_loss.topk",
            f"{got} in shape {tuple(teacher_token_ids.shape)}",
            f"set distillation_loss.topk={got}, or let the teacher's server send {topk} "
            "(vLLM: engine_kwargs.vllm.max_logprobs)",
        )


def _clamped(
    floor: float,
    hidden: Tensor,
    head: Tensor | LMHead,
    ids: Tensor,
    log_probs: Tensor,
    run: dict[str, Any],
) -> dict[str, Tensor]:
    """verl's divergence of log-probabilities clamped from below, and the masses before that."""
    log_s = entry_log_probs(hidden, head, ids, **run).log_probs
    counted = _counted(log_s[..., 0].detach(), run["token_weights"])
    log_t = torch.where(counted[..., None] != 0, log_probs.to(log_s), -torch.inf)
    clamped = log_t.clamp(min=floor)
    losses = (clamped.exp() * (clamped - log_s.clamp(min=floor))).sum(-1) * counted
    student_mass = log_s.detach().exp().sum(-1) * counted
    return {
        "distillation_losses": losses,
        "student_mass": student_mass,
        "teacher_mass": log_t.exp().sum(-1),
    }


def _counted(values: Tensor, token_weights: Tensor | None) -> Tensor:
    """1 where a token counts, else 0."""
    return torch.ones_like(values) if token_weights is None else token_weights.to(values.dtype)
