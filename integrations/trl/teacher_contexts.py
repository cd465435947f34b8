"""The builder that makes the teacher's side of a batch, in place of TRL's.

``SDPOTrainer._prepare_training_batch`` calls ``teacher_context_builder.build`` and logs its
``last_metrics`` (TRL 1.16).

Dimension key:  B sequences, L positions, T completion tokens
"""

from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor

from fused_sd import align_responses
from fused_sd.integrations.shared.rollouts import Rollout, grouped
from fused_sd.integrations.trl.contexts import TeacherInputs, teacher_inputs


class TeacherContexts:
    """Makes a batch of the teacher prompts that the trainer's method returns for rollouts."""

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer
        self.last_metrics: dict[str, float] = {}
        self.more_inputs: dict[str, Tensor] = {}
        self.num_with_signal = 0

    def build(
        self, output: dict[str, Any], prompts: Any, rewards: Tensor, feedbacks: Any = None
    ) -> dict[str, Tensor]:
        """Return the teacher's inputs and the mask of rollouts that have something to learn from.

        Args:
            output: the batch so far, with TRL's names.
            prompts: the prompts of this process's rollouts.
            rewards: (B,) their rewards.
            feedbacks: the rows' ``privileged_context``, which is read from the rows here.
        """
        trainer = self.trainer
        rollouts = self._rollouts(output, prompts, rewards)
        contexts = [trainer.teacher_prompts(rollout) for rollout in rollouts]
        active = [context is not None for context in contexts]
        mask = output["completion_mask"]
        self.more_inputs = {"loss_mask": mask, **trainer.more_inputs(rollouts, output)}
        # A rollout without context still needs a row, which its weight of 0 takes out of the loss.
        given = [
            rollout.prompt_ids if context is None else context
            for rollout, context in zip(rollouts, contexts)
        ]
        inputs = teacher_inputs(
            given,
            output["completion_ids"],
            mask,
            pad_id=trainer._tokenizer.pad_token_id,
            max_length=trainer.args.max_reprompt_len,
        )
        _check_aligned(output, inputs)
        counts = gather_object([(sum(active), inputs.num_truncated, len(rollouts))])
        self.num_with_signal, num_truncated, size = map(sum, zip(*counts))
        self.last_metrics = {
            "self_distillation/reprompt_sample_fraction": self.num_with_signal / size,
            "self_distillation/truncated_reprompt_fraction": num_truncated / size,
        }
        return {
            "teacher_input_ids": inputs.input_ids,
            "teacher_attention_mask": inputs.attention_mask,
            "self_distillation_mask": torch.tensor(active, device=mask.device).float(),
        }

    def _rollouts(self, output: dict[str, Any], prompts: Any, rewards: Tensor) -> list[Rollout]:
        """Return this process's rollouts, each with its group from all processes.

        A group may lie on two processes, since TRL deals out prompts by the generation batch.
        """
        trainer = self.trainer
        is_training = trainer.model.training
        size = trainer.num_generations if is_training else trainer.num_generations_eval
        texts, local = gather_object(trainer._texts), rewards.tolist()
        groups = grouped(texts, gather_object(local), size)
        first = trainer.accelerator.process_index * len(local)
        lengths = output["prompt_mask"].sum(1).tolist()
        completions = trainer._get_completion_ids_list(output)
        return [
            Rollout(
                prompt=prompts[n],
                prompt_ids=output["prompt_ids"][n, -lengths[n] :].tolist() if lengths[n] else [],
                completion_ids=completions[n],
                text=trainer._texts[n],
                reward=local[n],
                privileged=trainer._examples[n].get("privileged_context"),
                feedback=trainer._feedback[n],
                index=first + n,
                group=groups[(first + n) // size],
            )
            for n in range(len(local))
        ]


def _check_aligned(output: dict[str, Any], inputs: TeacherInputs) -> None:
    """Refuse a batch whose two sides do not end with the same completions.

    A shift by one token would train on wrong pairs of states, and the loss would still fall.
    """
    prompt_mask, completion_mask = output["prompt_mask"], output["completion_mask"]
    align_responses(
        torch.cat([output["prompt_ids"], output["completion_ids"]], 1).cpu(),
        torch.cat([prompt_mask, completion_mask], 1).cpu(),
        inputs.input_ids.cpu(),
        inputs.attention_mask.cpu(),
        student_response_mask=torch.cat([torch.zeros_like(prompt_mask), completion_mask], 1).cpu(),
    )
