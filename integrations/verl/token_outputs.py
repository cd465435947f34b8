"""Per-token outputs that verl's engines would compute from logits, computed from hidden states.

Dimension key:  N tokens, D and D' hidden sizes, V and V' vocabularies, K entries sent by a server
"""

from dataclasses import fields
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from verl.workers.config import DistillationLossConfig

from fused_sd import (
    Comparison,
    ImportanceCap,
    LMHead,
    LossOutput,
    checks,
    divergence_loss,
    token_log_probs,
    topk_divergence_loss,
)
from fused_sd.integrations.verl import RLSD_LOSS, TOPK_LOSS
from fused_sd.integrations.verl.config import require_own_config

VERL_TOPK_LOSS = "forward_kl_topk"
MASSES = ("student_mass", "teacher_mass")


def token_outputs(
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
    """Compute what verl's ``model_output`` holds of each token, without the logits.

    Args:
        hidden, head: the student's states at the rows that predict ``token_ids``, and its lm_head.
        token_ids: int64, the next tokens.
        loss_config: ``distillation_config.distillation_loss``; None: no divergence.  With verl's
            own loss_mode ``"forward_kl_topk"`` the values are those of verl.
        teacher_token_ids, teacher_log_probs: integers and nats, the top-k of verl's teacher server
            at the same rows, at temperature 1.
        teacher: states and head, without gradient, of a teacher in this process.  Give this or a
            server's top-k.
        old_log_probs: nats, of ``token_ids`` under the policy that sampled them; read by
            ``importance_cap``.
        token_weights: rows where this is 0 cost nothing, may hold anything, and have outputs of 0.
        temperature: divides the logits of the student and of a teacher in this process.
        log_probs, entropy: whether to compute them.
        process_group, reduce_dhidden: as in ``fused_sd.divergence_loss``.

    Returns:
        The outputs asked for, (N,) each, fp32 (fp64 for fp64 states).  ``distillation_losses``,
        ``log_probs`` and ``entropy`` are differentiable and not weighted.  ``student_mass``,
        ``teacher_mass`` (on the support) and ``teacher_log_probs`` (RLSD with a teacher in this
        process) are detached.

    Raises:
        ValueError: the server sent another number of entries than topk, or a tensor that the
            settings need is missing.
    """
    run: dict[str, Any] = {
        "token_weights": None if token_weights is None else (token_weights != 0).float(),
        "temperature": temperature,
        "process_group": process_group,
        "reduce_dhidden": reduce_dhidden,
    }
    if loss_config is not None:
        run["backend"] = loss_config.get("backend", "auto")
        run["chunk_size"] = loss_config.get("chunk_size")
    wanted = {"student_log_prob": "log_probs"} if log_probs else {}  # our names, and verl's
    if entropy:
        wanted["student_entropy"] = "entropy"
    if loss_config is None or loss_config.loss_mode == RLSD_LOSS:
        return _sampled_token_outputs(hidden, head, token_ids, teacher, wanted, run)
    run |= {"token_ids": token_ids, "with_grad": tuple(wanted)}
    run |= _importance(loss_config, old_log_probs)
    if teacher is not None:
        output = _local_divergence(loss_config, hidden, head, teacher, run)
    else:
        served = teacher_token_ids, teacher_log_probs
        output = _server_divergence(loss_config, hidden, head, *served, run)
    # verl logs both masses for every top-k loss; over the whole vocabulary they are 1
    masses = output.metrics or dict.fromkeys(MASSES, _ones(output.loss, run["token_weights"]))
    others = {wanted[name]: values for name, values in (output.with_grad or {}).items()}
    return {"distillation_losses": output.loss, **masses, **others}


def _sampled_token_outputs(
    hidden: Tensor,
    head: Tensor | LMHead,
    token_ids: Tensor,
    teacher: tuple[Tensor, Tensor | LMHead] | None,
    wanted: dict[str, str],
    run: dict[str, Any],
) -> dict[str, Tensor]:
    """Compute the outputs of a loss without a divergence: of the sampled tokens alone."""
    outputs: dict[str, Tensor] = {}
    if wanted:
        has_entropy = "student_entropy" in wanted
        scored = token_log_probs(hidden, head, token_ids, entropy=has_entropy, **run)
        found = {"student_log_prob": scored.log_probs, "student_entropy": scored.entropy}
        outputs = {key: found[name] for name, key in wanted.items()}  # type: ignore[misc]
    if teacher is not None:
        states, teacher_head = teacher
        with torch.no_grad():
            known = token_log_probs(states, teacher_head, token_ids, **run)
        outputs["teacher_log_probs"] = known.log_probs
    return outputs


def _local_divergence(
    loss_config: DistillationLossConfig,
    hidden: Tensor,
    head: Tensor | LMHead,
    teacher: tuple[Tensor, Tensor | LMHead],
    run: dict[str, Any],
) -> LossOutput:
    """Compute the divergence from a teacher whose states and head are in this process."""
    comparison = require_own_config(loss_config).comparison
    states, teacher_head = teacher
    return divergence_loss(
        hidden,
        head,
        states,
        teacher_head,
        reduction="none",
        metrics=MASSES if comparison.support.is_truncated else (),
        **_keywords(comparison, without="log_prob_floor"),
        **run,
    )


def _server_divergence(
    loss_config: DistillationLossConfig,
    hidden: Tensor,
    head: Tensor | LMHead,
    ids: Tensor | None,
    log_probs: Tensor | None,
    run: dict[str, Any],
) -> LossOutput:
    """Compute the divergence from the top-k log-probabilities that a teacher server sent."""
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
    return topk_divergence_loss(
        hidden,
        head,
        ids,
        log_probs,
        reduction="none",
        metrics=MASSES,
        **_server_settings(loss_config),
        **run,
    )


def _server_settings(loss_config: DistillationLossConfig) -> dict[str, Any]:
    """Return the keywords of ``topk_divergence_loss`` for a loss on a server's top-k."""
    if loss_config.loss_mode == VERL_TOPK_LOSS:
        # verl's compute_forward_kl_topk sums p (log p - log q) over the entries, without a tail
        floor = loss_config.log_prob_min_clamp
        return {"divergence": "forward_kl", "remainder": "drop", "log_prob_floor": floor}
    return _keywords(require_own_config(loss_config).comparison, without="support")


def _keywords(comparison: Comparison, *, without: str) -> dict[str, Any]:
    """Return a comparison as keywords of a loss that lacks one of its settings."""
    names = (field.name for field in fields(comparison))
    return {name: getattr(comparison, name) for name in names if name != without}


def _importance(
    loss_config: DistillationLossConfig, old_log_probs: Tensor | None
) -> dict[str, ImportanceCap]:
    cap = loss_config.get("importance_cap")
    if cap is None:
        return {}
    if old_log_probs is None:
        checks.fail(
            "importance_cap",
            "come with old_log_probs in the batch",
            cap,
            "let verl compute them, or pass importance_cap=null",
        )
    assert old_log_probs is not None
    return {"importance": ImportanceCap(old_log_probs.detach(), cap)}


def _check_topk(topk: int | None, teacher_token_ids: Tensor) -> None:
    """Refuse a server's answer of another size than topk, as from a server with a lower limit."""
    got = teacher_token_ids.shape[-1]
    if got != topk:
        checks.fail(
            "teacher_ids",
            f"hold the {topk} entries of distillation_loss.topk",
            f"{got} in shape {tuple(teacher_token_ids.shape)}",
            f"set distillation_loss.topk={got}, or let the teacher's server send {topk} "
            "(vLLM: engine_kwargs.vllm.max_logprobs)",
        )


def _ones(values: Tensor, token_weights: Tensor | None) -> Tensor:
    """Return 1 for each token that has a weight and 0 for the others, shaped like ``values``."""
    return torch.ones_like(values) if token_weights is None else token_weights.to(values.dtype)
