"""From sampled completions to a training batch: rewards, feedback, advantages, masks.

Dimension key:  B sequences, T completion tokens
"""

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from fused_sd.checks import fail
from fused_sd.integrations.shared.rollouts import Rollout

FeedbackFunction = Callable[..., Sequence[str | None]]


class RolloutBatches:
    """The seams of TRL's ``SDPOTrainer`` through which a batch is made."""

    needs_signal: ClassVar[bool] = True  # a rollout without a teacher's signal has weight 0
    feedback_func: FeedbackFunction | None
    _examples: Sequence[dict[str, Any]] = ()  # the dataset's rows,
    _texts: Sequence[str] = ()  # what was sampled for them,
    _feedback: Sequence[str | None] = ()  # and what was said of it

    def more_inputs(self, rollouts: Sequence[Rollout], output: dict[str, Any]) -> dict[str, Tensor]:
        """Tensors (B, ...) to add to the batch; ``loss_mask`` (B, T) leaves out tokens."""
        return {}

    def _generate(self, prompt_ids: list[list[int]]) -> tuple[list[list[int]], list[list[int]]]:
        prompts, completions = super()._generate(prompt_ids)
        # an engine may return nothing for a completion that ended at once
        return prompts, [list(ids) or [self.end_token_ids[0]] for ids in completions]

    def _calculate_rewards(
        self, inputs: Any, prompts: Any, completions: Any, completion_ids_list: Any
    ) -> Tensor:
        self._examples = inputs
        self._texts = [c if isinstance(c, str) else c[0]["content"] for c in completions]
        self._feedback: Sequence[str | None] = [None] * len(prompts)
        if self.feedback_func is not None:
            columns = [key for key in inputs[0] if key not in ("prompt", "completion")]
            said = self.feedback_func(
                prompts=prompts,
                completions=completions,
                completion_ids=completion_ids_list,
                **{key: [example[key] for example in inputs] for key in columns},
            )
            if len(said) != len(prompts):
                rule = f"return one answer for each of {len(prompts)} completions"
                fail("feedback_func", rule, len(said), "return None where there is nothing to say")
            self._feedback = said
        return super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)

    def _prepare_training_batch(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        batch = super()._prepare_training_batch(inputs)
        batch.update(self.teacher_context_builder.more_inputs)
        if self.needs_signal:
            batch["loss_mask"] = batch["loss_mask"] * batch["self_distillation_mask"][:, None]
        batch["advantages"] = self._advantages(batch["rewards"])
        # () is not split: every step of the batch divides by the same count
        masks = (batch["loss_mask"], batch["completion_mask"])
        counts = torch.stack([mask.sum().float() for mask in masks])
        counts = self.accelerator.gather(counts[None]).sum(0)
        batch["num_loss_tokens"], batch["num_tokens"] = counts
        return batch

    def _advantages(self, rewards: Tensor) -> Tensor:
        """Rewards (B,) less their group's mean, scaled as asked for; a group of one keeps its."""
        everyone = self.accelerator.gather(rewards)
        size = self.num_generations if self.model.training else self.num_generations_eval
        groups = everyone.view(-1, size)
        centred = groups - groups.mean(1, keepdim=True) if size > 1 else groups
        if self.args.scale_rewards == "group" and size > 1:
            centred = centred / (groups.std(1, keepdim=True) + self.args.advantage_epsilon)
        elif self.args.scale_rewards == "batch" and everyone.numel() > 1:
            centred = centred / (everyone.std() + self.args.advantage_epsilon)
        start = self.accelerator.process_index * len(rewards)
        return centred.flatten()[start : start + len(rewards)]

    @property
    def end_token_ids(self) -> list[int]:
        """What ends a completion: all that the model declares; older TRL knows the tokenizer's."""
        declared: list[int] = getattr(self, "eos_token_ids", [self._tokenizer.eos_token_id])
        return declared

    def tokenize(self, prompt: Any) -> list[int]:
        """Tokens of a prompt with its chat template and generation header."""
        return self._tokenize_prompts_untruncated([prompt])[0]
