"""TRL's self-distillation trainers (SDPO, SDFT) without logits.

    from fused_sd.integrations.trl import FusedSDPOTrainer as SDPOTrainer

Arguments, configuration, rollouts, teachers, reductions and logged names are TRL's.  What changes
is that a forward returns scores of the completion instead of its logits: TRL's ``_forward_logits``
gives back the call unmade, and the loss makes it once it knows what it needs, teacher and student
in the order in which no step needs two heads.

Dimension key:  B sequences, T completion tokens, K entries, D hidden size
"""

import dataclasses
import warnings
from typing import Any

import torch
from torch import Tensor, nn
from trl.experimental.sdft import SDFTTrainer
from trl.experimental.sdpo import SDPOTrainer
from trl.experimental.sdpo.loss_utils import (
    add_tail_bucket,
    apply_importance_sampling_clipping,
    compute_divergence,
)

from fused_sd.integrations.shared import completion_scores as completion
from fused_sd.integrations.transformers import attach, unwrap
from fused_sd.integrations.trl.teacher_server import TeacherServerLoss


class FusedSelfDistillationMixin(TeacherServerLoss):
    """Put before a TRL self-distillation trainer: the same losses, from hidden states.

    Losses given plain logits, and models whose head cannot be reproduced, are left to TRL; the
    latter with a warning.
    """

    log_fused_metrics = True
    """Whether to log masses, entropies and KLs beside TRL's own metrics."""

    _fused = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.args.use_liger_kernel:  # its kernels for the layers, not its head: ours replaces it
            layers = {**(self.args.liger_kernel_config or {}), "fused_linear_cross_entropy": False}
            self.args.liger_kernel_config = layers
        try:
            for model in (self.model, self.teacher_model):
                attach(model, autocast=self.accelerator.autocast)
            self._fused = True
        except ValueError as error:
            warnings.warn(f"{type(self).__name__} runs TRL's own loss: {error}", stacklevel=2)

    def _forward_logits(
        self, model: nn.Module, input_ids: Tensor, attention_mask: Tensor, logits_to_keep: int
    ) -> Tensor | completion.CompletionForward:
        if not self._fused:
            return super()._forward_logits(model, input_ids, attention_mask, logits_to_keep)
        return completion.CompletionForward(model, input_ids, attention_mask, logits_to_keep)

    def _compute_rollout_logps(
        self,
        prompt_ids: Tensor,
        prompt_mask: Tensor,
        completion_ids: Tensor,
        completion_mask: Tensor,
    ) -> Tensor | None:
        if not self._fused:
            return super()._compute_rollout_logps(
                prompt_ids, prompt_mask, completion_ids, completion_mask
            )
        generate_every = self.args.steps_per_generation * self.num_iterations
        if self.args.gradient_accumulation_steps % generate_every == 0:
            return None
        forward = completion.CompletionForward(
            self.model,
            torch.cat([prompt_ids, completion_ids], dim=1),
            torch.cat([prompt_mask, completion_mask], dim=1),
            completion_ids.size(1),
        )
        with torch.no_grad():
            return forward(self._log_probs(completion_ids, completion_mask)).log_probs

    def _compute_teacher_student_logits(
        self, model: nn.Module, teacher_model: nn.Module, inputs: dict[str, Any]
    ) -> Any:
        """TRL's aligned masks, with scores where TRL has logits."""
        aligned = super()._compute_teacher_student_logits(model, teacher_model, inputs)
        if not isinstance(aligned.student_logits, completion.CompletionForward):
            return aligned
        modes = {
            "sampled_token": self._score_sampled_token,
            "topk_logits": self._score_topk,
            "full_logits": self._score_full,
        }
        mode = self.args.distillation_mode
        if mode not in modes:
            raise ValueError(f"distillation_mode must be one of: {', '.join(modes)}, got {mode!r}")
        scores = modes[mode](aligned, inputs)
        return dataclasses.replace(aligned, student_logits=scores, teacher_logits=None)

    def _score_sampled_token(self, aligned: Any, inputs: dict[str, Any]) -> completion.Scores:
        """The reverse KL's surrogate on the sampled tokens; one head at a time."""
        alpha = self.args.distillation_alpha
        if alpha != 1.0:
            raise ValueError(
                "Only reverse KL (alpha=1.0) is supported for token-level distillation when "
                f"`distillation_mode='sampled_token'`, got alpha={alpha}"
            )
        ids, mask = aligned.completion_ids, aligned.loss_mask
        student = aligned.student_logits(self._log_probs(ids, self._student_mask(inputs, mask)))
        teacher = self._run_teacher(aligned, self._log_probs(ids, mask))
        log_ratio = (student.log_probs - teacher.log_probs).detach()
        loss = log_ratio * student.log_probs
        loss = self._importance_weighted(loss, student.log_probs, inputs)
        metrics = {"sampled_reverse_kl": log_ratio}
        if self.log_fused_metrics:
            metrics["student_entropy"] = student.entropy.detach()
            metrics["teacher_entropy"] = teacher.entropy
        return completion.Scores(loss, student.log_probs, None, metrics)

    def _score_topk(self, aligned: Any, inputs: dict[str, Any]) -> completion.Scores:
        """The student's top-k first, then the teacher at those ids: one head at a time."""
        k = self.args.distillation_topk
        if k is None:
            raise ValueError(
                "`distillation_mode='topk_logits'` requires `distillation_topk` to be set."
            )
        mask = aligned.loss_mask
        scores_tokens = self._has_policy_loss() or self._importance(inputs) is not None
        student, sampled = aligned.student_logits(
            completion.student_entries(
                k,
                mask,
                self.temperature,
                token_ids=aligned.completion_ids if scores_tokens else None,
                token_mask=self._student_mask(inputs, mask),
                differentiable=self._has_policy_loss(),
            )
        )
        teacher = self._run_teacher(
            aligned, completion.entries(student.token_ids, mask, self.temperature)
        )
        loss, metrics = self._entry_divergence(student.log_probs, teacher.log_probs)
        loss = self._importance_weighted(loss, sampled, inputs)
        return completion.Scores(loss, sampled, None, metrics)

    def _score_full(self, aligned: Any, inputs: dict[str, Any]) -> completion.Scores:
        """The teacher's states first; the divergence inside the student's forward."""
        teacher_hidden, teacher_head = self._run_teacher(
            aligned, completion.with_head(self._outlives_forward(aligned))
        )
        output, sampled = aligned.student_logits(
            completion.full_divergence(
                teacher_hidden,
                teacher_head,
                self.args.distillation_alpha,
                self.temperature,
                token_ids=aligned.completion_ids,
                token_weights=completion.sequence_mean_weights(aligned.loss_mask),
                importance=self._importance(inputs),
                policy_mask=inputs["completion_mask"] if self._has_policy_loss() else None,
                observed=self.log_fused_metrics,
            )
        )
        metrics = dict(output.metrics)
        ratio = metrics.pop("importance_ratio", 1.0)
        return completion.Scores(output.token_loss * ratio, sampled, output.loss, metrics)

    def _compute_self_distillation_loss(
        self, model: nn.Module, inputs: dict[str, Any], distillation_logits: Any
    ) -> Tensor:
        scores = distillation_logits.student_logits
        if not isinstance(scores, completion.Scores):
            return super()._compute_self_distillation_loss(model, inputs, distillation_logits)
        mask = distillation_logits.loss_mask
        self._log_scores(model, scores, mask)
        if scores.loss is not None:
            return scores.loss
        return (scores.token_loss * completion.sequence_mean_weights(mask)).sum()

    def _compute_policy_loss(self, inputs: dict[str, Any], student_logits: Any) -> Tensor:
        if isinstance(student_logits, completion.Scores):
            current = student_logits.log_probs
        elif isinstance(student_logits, completion.CompletionForward):
            ids, mask = inputs["completion_ids"], inputs["completion_mask"]
            current = student_logits(self._log_probs(ids, mask)).log_probs
        else:
            return super()._compute_policy_loss(inputs, student_logits)
        assert current is not None  # scored whenever there is a policy loss
        loss = completion.clipped_policy_loss(
            current,
            inputs.get("old_per_token_logps"),
            inputs["advantages"],
            inputs["completion_mask"],
            epsilon=(self.epsilon_low, self.epsilon_high),
            level=self.importance_sampling_level,
            loss_type=self.loss_type,
            max_length=self.max_completion_length,
        )
        mean = self.accelerator.gather(loss.detach()).mean().item()
        self._metrics[self._phase(self.model)]["self_distillation/policy_loss"].append(mean)
        return loss

    def _entry_divergence(
        self,
        student: Tensor,  # (B, T, K)
        teacher: Tensor,  # (B, T, K)
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """TRL's divergence over K entries, tailed or renormalised: (B, T), and its metrics."""
        metrics = {}
        if self.log_fused_metrics:
            metrics["student_topk_mass"] = student.detach().exp().sum(-1)
            metrics["teacher_topk_mass"] = teacher.exp().sum(-1)
        if self.args.distillation_add_tail:
            student, teacher = add_tail_bucket(student), add_tail_bucket(teacher)
        else:
            student, teacher = student.log_softmax(-1), teacher.log_softmax(-1)
        if self.log_fused_metrics:
            with torch.no_grad():
                metrics["topk_forward_kl"] = compute_divergence(student, teacher, 0.0)
                metrics["topk_reverse_kl"] = compute_divergence(student, teacher, 1.0)
        return compute_divergence(student, teacher, self.args.distillation_alpha), metrics

    def _importance(self, inputs: dict[str, Any]) -> tuple[Tensor, float] | None:
        """Old log-probabilities (B, T) and cap of the importance ratio, where there is one."""
        clip, old = self.args.distillation_is_clip, inputs.get("old_per_token_logps")
        return None if clip is None or old is None else (old, clip)

    def _importance_weighted(
        self, token_loss: Tensor, sampled: Tensor | None, inputs: dict[str, Any]
    ) -> Tensor:
        importance = self._importance(inputs)
        if importance is None:
            return token_loss
        assert sampled is not None  # scored whenever there is a ratio
        return apply_importance_sampling_clipping(token_loss, sampled, *importance)

    def _log_probs(self, ids: Tensor, mask: Tensor) -> completion.Compute:
        return completion.log_probs(ids, mask, self.temperature, entropy=self.log_fused_metrics)

    def _run_teacher(self, aligned: Any, compute: completion.Compute) -> Any:
        """Run the teacher where TRL would: without gradient, in its adapter's context."""
        with torch.no_grad(), self._get_teacher_context_for_self_distillation():
            return aligned.teacher_logits(compute)

    def _outlives_forward(self, aligned: Any) -> bool:
        """Whether the teacher's head has to be copied to be whole during the student's forward."""
        is_sharded = self.is_fsdp_enabled or self.is_deepspeed_enabled
        teacher, student = aligned.teacher_logits.model, aligned.student_logits.model
        return is_sharded and unwrap(teacher) is not unwrap(student)

    def _has_policy_loss(self) -> bool:
        return getattr(self.args, "distillation_weight", 1.0) < 1.0

    def _student_mask(self, inputs: dict[str, Any], loss_mask: Tensor) -> Tensor:
        """Tokens whose student log-probabilities are needed: the policy loss takes them all."""
        return inputs["completion_mask"] if self._has_policy_loss() else loss_mask

    def _phase(self, model: nn.Module) -> str:
        return "train" if model.training else "eval"

    def _log_scores(self, model: nn.Module, scores: completion.Scores, mask: Tensor) -> None:
        """Log what TRL logs, and the metrics of the scores."""
        phase, token_loss = self._phase(model), scores.token_loss.detach()
        mean = (token_loss * mask).sum() / mask.sum().clamp(min=1.0)
        # on every rank, with tokens or without: gathering is collective
        self._log_self_distillation_metric(phase, self.accelerator.gather(mean).mean().item())
        if self.log_fused_metrics:
            means = completion.masked_means(scores.metrics, mask, self.accelerator.gather)
            for name, value in means.items():
                self._metrics[phase][f"self_distillation/{name}"].append(value)


class FusedSDPOTrainer(FusedSelfDistillationMixin, SDPOTrainer):
    """TRL's SDPOTrainer, without logits."""


class FusedSDFTTrainer(FusedSelfDistillationMixin, SDFTTrainer):
    """TRL's SDFTTrainer, without logits."""
