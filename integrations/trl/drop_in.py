"""TRL's self-distillation trainers (SDPO, SDFT) without logits.

    from fused_sd.integrations.trl import FusedSDPOTrainer as SDPOTrainer

Arguments, configuration, rollouts, teachers, reductions and logged names are TRL's.  Its
``compute_loss`` stays too.  It calls these methods (the same code in TRL 1.6 to 1.16):

    _compute_teacher_student_logits     runs student and teacher through _forward_logits
    _compute_policy_loss                hybrid loss only: reads the student's logits
    _compute_self_distillation_loss     reads both sides' logits

Here ``_forward_logits`` returns a forward that has not run (``CompletionForward``), and
``_compute_teacher_student_logits`` puts ``Scores`` where TRL has the student's logits.  Delaying
the forwards lets the objective choose what they compute and their order.  The sampled token and the
top-k need one head at a time; only the full divergence reads both in one forward.

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

from fused_sd import aggregation_weights
from fused_sd.integrations.shared import completion_scores as completion
from fused_sd.integrations.transformers import attach
from fused_sd.integrations.trl.teacher_server import TeacherServerLoss
from fused_sd.integrations.trl.teachers import teacher_head_is_resharded


class FusedSelfDistillationMixin(TeacherServerLoss):
    """Mixin before a TRL self-distillation trainer that computes its losses from hidden states.

    A model whose head cannot be reproduced is left to TRL's own loss, with a warning.  So is a loss
    that is called with logits, as subclasses of TRL's trainers may do.
    """

    log_fused_metrics = True
    """Whether to log masses, entropies and KLs beside TRL's own metrics."""

    _fused = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # Trainer applies Liger when training starts.  Its fused head would replace the forward that
        # ``attach`` installs below; its kernels for the layers may stay.
        if self.args.use_liger_kernel:
            layers = {**(self.args.liger_kernel_config or {}), "fused_linear_cross_entropy": False}
            self.args.liger_kernel_config = layers
        # After TRL's __init__, which makes the teacher.  accelerate may have prepared the teacher
        # there, and its autocast does not reach requests unless it is passed on.
        try:
            for model in (self.model, self.teacher_model):
                attach(model, autocast=self.accelerator.autocast)
            self._fused = True
        except ValueError as error:
            warnings.warn(f"{type(self).__name__} runs TRL's own loss: {error}", stacklevel=2)

    def _forward_logits(
        self, model: nn.Module, input_ids: Tensor, attention_mask: Tensor, logits_to_keep: int
    ) -> Tensor | completion.CompletionForward:
        """Return the forward unmade; whoever needs scores runs it."""
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
        """Score rollouts before they are trained on, if a ratio will be needed.

        TRL's method would take a log-softmax of what ``_forward_logits`` returns.
        """
        if not self._fused:
            return super()._compute_rollout_logps(
                prompt_ids, prompt_mask, completion_ids, completion_mask
            )
        generate_every = self.args.steps_per_generation * self.num_iterations
        # TRL's condition: rollouts that are used within one optimizer step have ratio 1.
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
        """Return TRL's aligned masks, with scores in the place of the student's logits."""
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
        """Compute the reverse KL's surrogate on the sampled tokens, with one head at a time."""
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
        """Compute the divergence over the student's top-k.

        The student runs first and chooses the ids, then the teacher scores them.
        """
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
        """Compute the divergence over the vocabulary.

        The teacher runs first and keeps its states.  The divergence runs in the student's forward.
        """
        is_resharded = teacher_head_is_resharded(
            self, aligned.teacher_logits.model, aligned.student_logits.model
        )
        teacher_hidden, teacher_head = self._run_teacher(
            aligned, completion.with_head(is_resharded)
        )
        output, sampled = aligned.student_logits(
            completion.full_divergence(
                teacher_hidden,
                teacher_head,
                self.args.distillation_alpha,
                self.temperature,
                token_ids=aligned.completion_ids,
                token_weights=_mean_weights(aligned.loss_mask),
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
        return (scores.token_loss * _mean_weights(mask)).sum()

    def _compute_policy_loss(self, inputs: dict[str, Any], student_logits: Any) -> Tensor:
        """Compute TRL's policy loss from the completion's log-probabilities.

        ``compute_loss`` passes what ``_compute_teacher_student_logits`` returned, or at
        ``distillation_weight=0`` what ``_forward_logits`` returned.
        """
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
        """Return TRL's divergence (B, T) over K entries, tailed or renormalised, and metrics."""
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
        """Return old log-probabilities (B, T) and the cap of the importance ratio, or None."""
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
        """Run the teacher without gradient, with the adapter that TRL's teacher kind means.

        ``_compute_teacher_student_logits`` has left TRL's context by now, having run nothing in it.
        """
        with torch.no_grad(), self._get_teacher_context_for_self_distillation():
            return aligned.teacher_logits(compute)

    def _has_policy_loss(self) -> bool:
        # SDFT has neither the setting nor the loss.
        return getattr(self.args, "distillation_weight", 1.0) < 1.0

    def _student_mask(self, inputs: dict[str, Any], loss_mask: Tensor) -> Tensor:
        """Return the tokens (B, T) whose student log-probabilities are needed.

        The policy loss averages over all tokens, the distillation over rollouts with a teacher.
        """
        return inputs["completion_mask"] if self._has_policy_loss() else loss_mask

    def _phase(self, model: nn.Module) -> str:
        return "train" if model.training else "eval"

    def _log_scores(self, model: nn.Module, scores: completion.Scores, mask: Tensor) -> None:
        """Log what TRL logs, and the metrics of the scores."""
        phase, token_loss = self._phase(model), scores.token_loss.detach()
        mean = (token_loss * mask).sum() / mask.sum().clamp(min=1.0)
        # Also where the mask is empty: gathering is collective, and other ranks may have tokens.
        self._log_self_distillation_metric(phase, self.accelerator.gather(mean).mean().item())
        if self.log_fused_metrics:
            means = completion.masked_means(scores.metrics, mask, self.accelerator.gather)
            for name, value in means.items():
                self._metrics[phase][f"self_distillation/{name}"].append(value)


def _mean_weights(mask: Tensor) -> Tensor:
    """Return weights (B, T) of TRL's reduction: each sequence's mean, averaged over all B rows."""
    return aggregation_weights(mask, "all_sequences_mean_token_mean")


class FusedSDPOTrainer(FusedSelfDistillationMixin, SDPOTrainer):
    """TRL's SDPOTrainer, without logits."""


class FusedSDFTTrainer(FusedSelfDistillationMixin, SDFTTrainer):
    """TRL's SDFTTrainer, without logits."""
