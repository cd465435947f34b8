"""The teacher's side of a batch, from the prompts that a method writes for its rollouts.

Dimension key:  B sequences, L positions, T completion tokens
"""

import logging
from collections.abc import Sequence
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor

from fused_sd import align_responses
from fused_sd.integrations.shared.padding import TOKEN_TYPES
from fused_sd.integrations.shared.rollouts import Rollout, grouped
from fused_sd.integrations.shared.thinking import answer_text
from fused_sd.integrations.trl.contexts import TeacherInputs, TokenTypes, teacher_inputs

logger = logging.getLogger(__name__)
PATIENCE = 10  # batches without any signal before a warning


class TeacherContexts:
    """Makes a batch of the teacher prompts that the trainer's method returns for rollouts."""

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer
        self.num_idle = 0  # batches without any signal, one after the other
        self.num_cut = self.num_lost = 0  # prompts of this batch that are too long

    def build(self, output: dict[str, Any]) -> dict[str, Tensor]:
        """Return the teacher's inputs and the mask of rollouts that have something to learn from.

        Args:
            output: the batch so far, with TRL's names and the ``loss_mask``.
        """
        trainer = self.trainer
        rollouts = self._rollouts(output)
        self.num_cut = self.num_lost = 0
        prompts = [trainer.teacher_prompts(rollout) for rollout in rollouts]
        made: dict[str, Tensor] = dict(trainer.more_inputs(rollouts, output))
        if trainer.has_teacher:
            prompts = self.fitted(prompts, rollouts)
            inputs = self.inputs(prompts, rollouts, output)
            made.update(self.named("teacher_", inputs, output))
            _check_aligned(output, inputs)
        active = [prompt is not None for prompt in prompts]
        made["self_distillation_mask"] = torch.tensor(active, device=output["loss_mask"].device)
        made["self_distillation_mask"] = made["self_distillation_mask"].float()
        self._log(rollouts, (sum(active), self.num_cut, self.num_lost, len(rollouts)))
        return made

    def fitted(
        self, prompts: Sequence[list[int] | None], rollouts: Sequence[Rollout]
    ) -> list[list[int] | None]:
        """Cut prompts to ``max_reprompt_len``: they lose their beginning, and keep the header.

        A prompt whose images would be cut becomes None: features need their tokens.

        Args:
            prompts, rollouts: as in ``inputs``.
        """
        limit, times = self.trainer.args.max_reprompt_len, len(prompts) // len(rollouts)
        kept: list[list[int] | None] = []
        for n, prompt in enumerate(prompts):
            cut = None if prompt is None else prompt[-limit:]
            if prompt is not None and cut is not None:
                own = rollouts[n // times].prompt_ids
                is_lost = self._num_image_tokens(cut) != self._num_image_tokens(own)
                self.num_cut += len(cut) < len(prompt)
                self.num_lost += is_lost
                cut = None if is_lost else cut
            kept.append(cut)
        return kept

    def inputs(
        self,
        prompts: Sequence[list[int] | None],
        rollouts: Sequence[Rollout],
        output: dict[str, Any],
    ) -> TeacherInputs:
        """Return sequences of prompts and the rollouts' completions.

        Args:
            prompts: as many for each rollout as there are more prompts than rollouts; in the place
                of None, which still needs a row, stands the rollout's own prompt.
            rollouts: this process's.
            output: the batch so far.
        """
        times = len(prompts) // len(rollouts)
        given = [
            rollouts[n // times].prompt_ids if prompt is None else prompt
            for n, prompt in enumerate(prompts)
        ]
        return teacher_inputs(
            given,
            output["completion_ids"].repeat_interleave(times, 0),
            output["completion_mask"].repeat_interleave(times, 0),
            pad_id=self.trainer._tokenizer.pad_token_id,
            multiple=self.trainer.pad_to_multiple_of,
        )

    def named(
        self, prefix: str, inputs: TeacherInputs, output: dict[str, Any]
    ) -> dict[str, Tensor]:
        """Return sequences and their token types under the names that ``run_teacher`` reads."""
        made = {
            f"{prefix}input_ids": inputs.input_ids,
            f"{prefix}attention_mask": inputs.attention_mask,
        }
        ids = torch.cat([output["prompt_ids"], output["completion_ids"]], 1)
        for name in TOKEN_TYPES:
            if output.get(name) is not None:
                made[f"{prefix}{name}"] = TokenTypes(ids, output[name]).of(inputs.input_ids)
        return made

    def _num_image_tokens(self, ids: Sequence[int]) -> int:
        image_token = getattr(self.trainer.processing_class, "image_token_id", None)
        return 0 if image_token is None else list(ids).count(image_token)

    def _rollouts(self, output: dict[str, Any]) -> list[Rollout]:
        """Return this process's rollouts, each with its group from all processes.

        A group may lie on two processes, since TRL deals out prompts by the generation batch.
        """
        trainer, scored = self.trainer, self.trainer.scored
        is_training = trainer.model.training
        size = trainer.num_generations if is_training else trainer.num_generations_eval
        rewards = scored.rewards.tolist()
        masked = zip(output["prompt_ids"], output["prompt_mask"])
        prompts = [ids[mask.bool()].tolist() for ids, mask in masked]
        answers: list[str | None] = [None] * len(prompts)
        if getattr(trainer.args, "remove_thinking_from_demonstration", False):
            tokenizer, tags = trainer._tokenizer, trainer.args.thinking_tags
            said = zip(scored.texts, prompts, scored.completion_ids)
            answers = [answer_text(tokenizer, *one, tags) for one in said]
        every = gather_object(list(zip(scored.texts, answers)))
        groups = grouped([text for text, _ in every], rewards, size, [known for _, known in every])
        first = trainer.accelerator.process_index * len(scored.texts)
        return [
            Rollout(
                prompt=scored.prompts[n],
                prompt_ids=prompts[n],
                completion_ids=list(scored.completion_ids[n]),
                text=scored.texts[n],
                reward=rewards[first + n],
                privileged=scored.examples[n].get("privileged_context"),
                feedback=scored.feedback[n],
                index=first + n,
                group=groups[(first + n) // size],
                observation=scored.observations[n],
                example=scored.examples[n],
                tools=trainer.tools_of(n),
                answer=answers[n],
            )
            for n in range(len(scored.texts))
        ]

    def _log(self, rollouts: Sequence[Rollout], counts: tuple[int, ...]) -> None:
        """Log shares over all processes, and warn of what was cut and of batches without signal."""
        trainer = self.trainer
        flags = [trainer.context_flags(rollout) for rollout in rollouts]
        every = gather_object(flags)
        gathered = gather_object([counts])
        with_signal, num_cut, num_lost, size = map(sum, zip(*gathered, strict=True))
        shares = {name: sum(flag[name] for flag in every) / size for name in every[0]}
        shares["reprompt_sample_fraction"] = with_signal / size
        if trainer.has_teacher:
            shares["truncated_reprompt_fraction"] = num_cut / size
        metrics = trainer._metrics[trainer._phase(trainer.model)]
        for name, share in shares.items():
            metrics[f"self_distillation/{name}"].append(share)
        if not trainer.accelerator.is_main_process:
            return
        if num_cut or num_lost:
            logger.warning(
                "%d teacher prompts of %d rollouts are longer than max_reprompt_len=%d and lost "
                "their beginning; %d that would have lost images are left out.",
                num_cut,
                size,
                trainer.args.max_reprompt_len,
                num_lost,
            )
        self.num_idle = 0 if with_signal else self.num_idle + 1
        if self.num_idle and self.num_idle % PATIENCE == 0:
            signal, context = "a signal", "a context for the teacher: rewards alone teach"
            lacking = signal if trainer.needs_signal else context
            text = "%s: no rollout of the last %d batches has %s."
            logger.warning(text, trainer._name, self.num_idle, lacking)


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
