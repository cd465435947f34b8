"""How sampled completions become a training batch: rewards, feedback, advantages and masks.

(What is said of TRL was read in 1.16.)

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
    """Overrides the methods of TRL's ``SDPOTrainer`` that make a batch."""

    needs_signal: ClassVar[bool] = True  # whether a rollout whose prompt is None has weight 0
    feedback_func: FeedbackFunction | None
    # Of the rollouts that are being made: the dataset's rows, the completions, and the feedback.
    # TRL hands the context builder neither rows nor texts; ``TeacherContexts`` reads them here.
    _examples: Sequence[dict[str, Any]] = ()
    _texts: Sequence[str] = ()
    _feedback: Sequence[str | None] = ()

    def more_inputs(self, rollouts: Sequence[Rollout], output: dict[str, Any]) -> dict[str, Tensor]:
        """Return tensors (B, ...) to add to the batch; ``loss_mask`` (B, T) leaves out tokens.

        Args:
            rollouts: this process's.
            output: the batch so far, with TRL's names.
        """
        return {}

    def _generate(self, prompt_ids: list[list[int]]) -> tuple[list[list[int]], list[list[int]]]:
        """Sample completions; one that ended at once is its end token.

        An engine may return no token for such a completion, and TRL reads each completion's last.
        """
        prompts, completions = super()._generate(prompt_ids)
        return prompts, [list(ids) or [self.end_token_ids[0]] for ids in completions]

    def _calculate_rewards(
        self, inputs: Any, prompts: Any, completions: Any, completion_ids_list: Any
    ) -> Tensor:
        """Ask for feedback too: only here are rows, texts and tokens of the rollouts at hand."""
        self._examples = inputs
        self._texts = [c if isinstance(c, str) else c[0]["content"] for c in completions]
        self._feedback: Sequence[str | None] = [None] * len(prompts)
        if self.feedback_func is not None:
            columns = [key for key in inputs[0] if key not in ("prompt", "completion")]
            answers = self.feedback_func(
                prompts=prompts,
                completions=completions,
                completion_ids=completion_ids_list,
                **{key: [example[key] for example in inputs] for key in columns},
            )
            if len(answers) != len(prompts):
                rule = f"return one answer for each of {len(prompts)} completions"
                remedy = "return None where there is nothing to say"
                fail("feedback_func", rule, len(answers), remedy)
            self._feedback = answers
        return super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)

    def _prepare_training_batch(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        """Add a method's tensors, the loss mask, advantages and token counts to TRL's batch."""
        batch = super()._prepare_training_batch(inputs)
        batch.update(self.teacher_context_builder.more_inputs)
        if self.needs_signal:
            batch["loss_mask"] = batch["loss_mask"] * batch["self_distillation_mask"][:, None]
        batch["advantages"] = self._advantages(batch["rewards"])
        # TRL splits the batch into micro-batches along the first dimension and leaves tensors
        # without one as they are: all micro-batches divide by the same counts.
        masks = (batch["loss_mask"], batch["completion_mask"])
        counts = torch.stack([mask.sum().float() for mask in masks])
        counts = self.accelerator.gather(counts[None]).sum(0)
        batch["num_loss_tokens"], batch["num_tokens"] = counts
        return batch

    def _advantages(self, rewards: Tensor) -> Tensor:
        """Return advantages (B,): rewards less their group's mean, scaled by ``scale_rewards``.

        TRL's own advantages add a fixed 1e-4 to the divisor, even where nothing is scaled, and are
        0 or NaN in groups of one.  Here a group of one keeps its reward.
        """
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
        """The tokens that end a completion: all that the model declares.

        TRL has ``eos_token_ids`` in recent releases only; before it stopped at the tokenizer's.
        """
        declared: list[int] = getattr(self, "eos_token_ids", [self._tokenizer.eos_token_id])
        return declared

    def tokenize(self, prompt: Any) -> list[int]:
        """Return the tokens of a prompt, with chat template and generation header."""
        return self._tokenize_prompts_untruncated([prompt])[0]
