"""TRL's self-distillation trainers (SDPO, SDFT) without logits.

    from fused_sd.integrations.trl import FusedSDPOTrainer as SDPOTrainer

Arguments, configuration, rollouts, teachers, reductions and logged names are TRL's.  Its
``compute_loss`` stays too.  It calls these methods (the same code in TRL 1.6 to 1.16):

    _compute_teacher_student_logits     runs student and teacher through _forward_logits
    _compute_policy_loss                hybrid loss only: reads the student's logits
    _compute_self_distillation_loss     reads both sides' logits

Here ``_forward_logits`` returns a forward that has not run (``CompletionForward``), and
``_compute_teacher_student_logits`` puts ``Scores`` where TRL has the student's logits.  Delaying
the forwards lets the objective choose what they compute and in which order.

Dimension key:  B sequences, T completion tokens
"""

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn
from trl.experimental.sdft import SDFTTrainer
from trl.experimental.sdpo import SDPOTrainer

from fused_sd.checks import fail
from fused_sd.integrations.shared.as_it_was import left_as_it_was
from fused_sd.integrations.shared.completion_scores import CompletionForward
from fused_sd.integrations.trl.config import SelfDistillationConfig
from fused_sd.integrations.trl.objectives import DistillationObjectives
from fused_sd.integrations.trl.scores import (
    Scores,
    clipped_policy_loss,
    masked_means,
    sequence_mean_weights,
)
from fused_sd.integrations.trl.swaps import attach_or_warn, check_prompts
from fused_sd.integrations.trl.teacher_server import TeacherServerLoss


class FusedSelfDistillationMixin(TeacherServerLoss, DistillationObjectives):
    """Mixin before a TRL self-distillation trainer that computes its losses from hidden states.

    A model whose head cannot be reproduced is left to TRL's own loss, with a warning.  So is a loss
    that is called with logits, as subclasses of TRL's trainers may do.

    Examples:
        >>> from trl.experimental.sdpo import SDPOTrainer
        >>> from fused_sd.integrations.trl import FusedSelfDistillationMixin
        >>> class Own(SDPOTrainer):  # your subclass of TRL's
        ...     pass
        >>> class FusedOwn(FusedSelfDistillationMixin, Own):
        ...     pass
    """

    _fused = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        for config in (*args, *kwargs.values()):
            if isinstance(config, SelfDistillationConfig):
                kind = f"{type(config).__module__}.{type(config).__qualname__}"
                remedy = "pass TRL's, or train with fused_sd's trainer of that name"
                fail("args", f"be TRL's configuration for {type(self).__name__}", kind, remedy)
        with left_as_it_was(*args, **kwargs):
            super().__init__(*args, **kwargs)
            check_prompts(self)
            # After TRL's __init__, which makes the teacher.
            self._fused = attach_or_warn(self, (self.model, self.teacher_model))

    def _forward_logits(
        self, model: nn.Module, input_ids: Tensor, attention_mask: Tensor, logits_to_keep: int
    ) -> Tensor | CompletionForward:
        """Return the forward unmade; whoever needs scores runs it."""
        if not self._fused:
            return super()._forward_logits(model, input_ids, attention_mask, logits_to_keep)
        return CompletionForward(
            model, input_ids, attention_mask, logits_to_keep, keeps_padding=True
        )

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
        forward = CompletionForward(
            self.model,
            torch.cat([prompt_ids, completion_ids], dim=1),
            torch.cat([prompt_mask, completion_mask], dim=1),
            completion_ids.size(1),
            keeps_padding=True,
        )
        with torch.no_grad():
            return forward(self._log_probs(completion_ids, completion_mask)).log_probs

    def _compute_teacher_student_logits(
        self, model: nn.Module, teacher_model: nn.Module, inputs: dict[str, Any]
    ) -> Any:
        """Return TRL's aligned masks, with scores in the place of the student's logits."""
        aligned = super()._compute_teacher_student_logits(model, teacher_model, inputs)
        if not isinstance(aligned.student_logits, CompletionForward):
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

    def _compute_self_distillation_loss(
        self, model: nn.Module, inputs: dict[str, Any], distillation_logits: Any
    ) -> Tensor:
        scores = distillation_logits.student_logits
        if not isinstance(scores, Scores):
            return super()._compute_self_distillation_loss(model, inputs, distillation_logits)
        mask = distillation_logits.loss_mask
        self._log_scores(model, scores, mask)
        if scores.loss is not None:
            return scores.loss
        return (scores.token_loss * sequence_mean_weights(mask)).sum()

    def _compute_policy_loss(self, inputs: dict[str, Any], student_logits: Any) -> Tensor:
        """Compute TRL's policy loss from the completion's log-probabilities.

        ``compute_loss`` passes what ``_compute_teacher_student_logits`` returned, or at
        ``distillation_weight=0`` what ``_forward_logits`` returned.
        """
        if isinstance(student_logits, Scores):
            current = student_logits.log_probs
        elif isinstance(student_logits, CompletionForward):
            ids, mask = inputs["completion_ids"], inputs["completion_mask"]
            current = student_logits(self._log_probs(ids, mask)).log_probs
        else:
            return super()._compute_policy_loss(inputs, student_logits)
        assert current is not None  # scored whenever there is a policy loss
        loss = clipped_policy_loss(
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

    def _phase(self, model: nn.Module) -> str:
        return "train" if model.training else "eval"

    def _log_scores(self, model: nn.Module, scores: Scores, mask: Tensor) -> None:
        """Log what TRL logs, and the metrics of the scores."""
        phase, token_loss = self._phase(model), scores.token_loss.detach()
        mean = (token_loss * mask).sum() / mask.sum().clamp(min=1.0)
        # Also where the mask is empty: gathering is collective, and other ranks may have tokens.
        self._log_self_distillation_metric(phase, self.accelerator.gather(mean).mean().item())
        if self.log_fused_metrics:
            means = masked_means(scores.metrics, mask, self.accelerator.gather)
            for name, value in means.items():
                self._metrics[phase][f"self_distillation/{name}"].append(value)


class FusedSDPOTrainer(FusedSelfDistillationMixin, SDPOTrainer):
    """TRL's SDPOTrainer, without logits.

    Examples:
        >>> from trl.experimental.sdpo import SDPOConfig
        >>> from fused_sd.integrations.examples.arithmetic import questions, reward
        >>> from fused_sd.integrations.trl import FusedSDPOTrainer
        >>> model = "Qwen/Qwen2.5-0.5B-Instruct"
        >>> args = SDPOConfig("out", distillation_mode="full_logits")  # TRL's, with TRL's defaults
        >>> trainer = FusedSDPOTrainer(
        ...     model=model, reward_funcs=reward, args=args, train_dataset=questions(64)
        ... )
        >>> trainer.train()  # doctest: +SKIP
    """


class FusedSDFTTrainer(FusedSelfDistillationMixin, SDFTTrainer):
    """TRL's SDFTTrainer, without logits.

    Examples:
        >>> from trl.experimental.sdft import SDFTConfig
        >>> from fused_sd.integrations.examples.arithmetic import questions
        >>> from fused_sd.integrations.trl import FusedSDFTTrainer
        >>> model = "Qwen/Qwen2.5-0.5B-Instruct"
        >>> args = SDFTConfig("out", max_completion_length=256)
        >>> trainer = FusedSDFTTrainer(model=model, args=args, train_dataset=questions(64))
        >>> trainer.train()  # doctest: +SKIP
    """
