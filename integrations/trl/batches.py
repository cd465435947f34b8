"""How TRL's rollouts become a training batch: feedback, advantages, masks and the teacher's side.

(What is said of TRL was read in 1.16.)

Dimension key:  B sequences of this process, N of all processes, T completion tokens
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from fused_sd.checks import fail
from fused_sd.integrations.shared.returned import texts
from fused_sd.integrations.shared.rollouts import Rollout
from fused_sd.integrations.trl.reward_functions import advantages, checked, summed

FeedbackFunction = Callable[..., Sequence[str | None]]
FEEDBACK_METHOD = "get_feedback"  # of an environment


@dataclass(frozen=True, eq=False)
class Scored:
    """What is known of a batch's rollouts once they have rewards.

    Attributes:
        examples: the dataset's rows.
        prompts: as the student read them, with images and an environment's observation.
        completion_ids: of this process, tools' results included.
        texts: the completions without special tokens.
        observations: the last result of a tool in each completion, or None.
        feedback: what the environment said about each completion, or None.
        rewards: (N,) weighted sums; NaN where no reward function had a verdict.
    """

    examples: Sequence[dict[str, Any]]
    prompts: Sequence[Any]
    completion_ids: Sequence[list[int]]
    texts: Sequence[str]
    observations: Sequence[str | None]
    feedback: Sequence[str | None]
    rewards: Tensor


class RolloutBatches:
    """Overrides the methods of TRL's ``GRPOTrainer`` that make a batch."""

    needs_signal: ClassVar[bool] = True  # whether a rollout whose prompt is None has weight 0
    feedback_func: FeedbackFunction | None
    # TRL's batch holds neither rows nor texts: the teacher's contexts read them here.
    scored: Scored

    @property
    def hears_feedback(self) -> bool:
        """Whether somebody is asked about a completion: ``feedback_func``, or an environment."""
        if self.environment_factories is None:
            return self.feedback_func is not None
        known = [hasattr(pool[0], FEEDBACK_METHOD) for pool in self._environment_pool.values()]
        return self.feedback_func is not None or any(known)

    def more_inputs(self, rollouts: Sequence[Rollout], output: dict[str, Any]) -> dict[str, Tensor]:
        """Return tensors (B, ...) to add to the batch; ``loss_mask`` (B, T) leaves out tokens.

        Args:
            rollouts: this process's.
            output: the batch so far, with TRL's names and the ``loss_mask``.
        """
        return {}

    def _generate_single_turn(self, prompt_ids: Any, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        """Sample one completion of each prompt; one that ended at once is its end token.

        An engine may return no token for such a completion, and TRL reads each completion's last.
        """
        completions, log_probs = super()._generate_single_turn(prompt_ids, *args, **kwargs)
        if len(completions) != len(prompt_ids):
            rule, got = "be 1", f"{len(completions)} completions of {len(prompt_ids)} prompts"
            remedy = "remove it from the model's generation_config; num_generations repeats prompts"
            fail("num_return_sequences", rule, got, remedy)
        empty = [n for n, ids in enumerate(completions) if not len(ids)]
        for n in empty:
            completions[n] = [self.end_token_ids[0]]
            if log_probs is not None:
                log_probs[n] = [None]  # not known: TRL then corrects nothing
        return completions, log_probs

    def _tool_call_loop(self, *args: Any, **kwargs: Any) -> Any:
        """Run the tools, of which an environment's method for feedback is none."""
        for tools in (*self._sync_tool_dicts, *self._async_tool_dicts):
            tools.pop(FEEDBACK_METHOD, None)
        return super()._tool_call_loop(*args, **kwargs)

    def _calculate_rewards(
        self, inputs: Any, prompts: Any, completions: Any, completion_ids_list: Any
    ) -> Tensor:
        """Ask for feedback too: only here are rows, prompts and completions at hand."""
        own = self.reward_funcs
        if own:
            has_loop = hasattr(self, "async_loop")
            named = zip(own, self.reward_func_names, strict=True)
            self.reward_funcs = [checked(one, name, has_loop=has_loop) for one, name in named]
            try:
                given = super()._calculate_rewards(
                    inputs, prompts, completions, completion_ids_list
                )
            finally:
                self.reward_funcs = own
        else:
            number = len(prompts) * self.accelerator.num_processes
            given = torch.full((number, 1), torch.nan, device=self.accelerator.device)
        self.scored = Scored(
            inputs,
            prompts,
            completion_ids_list,
            self._tokenizer.batch_decode(completion_ids_list, skip_special_tokens=True),
            [_observation(completion) for completion in completions],
            self._ask_for_feedback(inputs, prompts, completions, completion_ids_list),
            summed(given, self.reward_weights, self.reward_func_names),
        )
        return given

    def _ask_for_feedback(
        self, inputs: Any, prompts: Any, completions: Any, completion_ids_list: Any
    ) -> Sequence[str | None]:
        """Return what ``feedback_func`` says of each completion, else what the environments say."""
        environments = getattr(self, "environments", None)
        if self.feedback_func is not None:
            name = "feedback_func"
            known = ("prompt", "completion", "completion_ids")
            columns = [key for key in inputs[0] if key not in known]
            answers: Any = self.feedback_func(
                prompts=prompts,
                completions=completions,
                completion_ids=completion_ids_list,
                **({} if environments is None else {"environments": environments}),
                **{key: [example[key] for example in inputs] for key in columns},
            )
        elif environments is not None:
            name = FEEDBACK_METHOD
            methods = [getattr(one, FEEDBACK_METHOD, None) for one in environments]
            answers = [None if method is None else method() for method in methods]
        else:
            return [None] * len(prompts)
        return texts(name, answers, len(prompts))

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        """Add the teacher's side, the loss mask, advantages and token counts to TRL's batch."""
        batch = super()._generate_and_score_completions(inputs)
        start = self.accelerator.process_index * len(inputs)
        local = slice(start, start + len(inputs))
        size = self.num_generations if self.model.training else self.num_generations_eval
        rewards, args = self.scored.rewards, self.args
        gained = advantages(rewards, size, args.scale_rewards, args.advantage_epsilon)
        batch["rewards"], batch["advantages"] = rewards[local], gained[local]
        self._relog(gained)
        mask = batch["completion_mask"]
        batch["loss_mask"] = mask * batch["tool_mask"] if "tool_mask" in batch else mask
        sampled = batch["loss_mask"].sum().float()
        batch.update(self.teacher_contexts.build(batch))
        if self.needs_signal:
            batch["loss_mask"] = batch["loss_mask"] * batch["self_distillation_mask"][:, None]
        # TRL splits the batch into micro-batches along the first dimension and leaves tensors
        # without one as they are: all micro-batches divide by the same counts.
        counts = torch.stack([batch["loss_mask"].sum().float(), sampled])
        counts = self.accelerator.gather(counts[None]).sum(0)
        batch["num_loss_tokens"], batch["num_tokens"] = counts
        return batch

    def _prepare_inputs(self, generation_batch: Any) -> Any:
        """Tell callbacks of new rollouts, as TRL's self-distillation trainers do."""
        before = self._buffered_inputs
        inputs = super()._prepare_inputs(generation_batch)
        if self._buffered_inputs is not before:
            for callback in self.callback_handler.callbacks:
                if hasattr(callback, "on_generation_batch_built"):
                    callback.on_generation_batch_built(self.args, self.state)
        return inputs

    def _relog(self, gained: Tensor) -> None:
        """Put the advantages that are trained on into TRL's table; leave out absent rewards."""
        table = self._logs["advantages"]
        for _ in range(min(len(gained), len(table))):
            table.pop()
        table.extend(gained.tolist())
        if not self.reward_funcs:
            for name in ("reward", "reward_std", "frac_reward_zero_std"):
                self._metrics[self._phase(self.model)].pop(name, None)

    @property
    def end_token_ids(self) -> list[int]:
        """The tokens that end a completion: all that the model declares.

        TRL has ``eos_token_ids`` in recent releases only; before it stopped at the tokenizer's.
        """
        declared: list[int] = getattr(self, "eos_token_ids", [self._tokenizer.eos_token_id])
        return declared

    def tokenize(self, prompt: Any, tools: Sequence[Any] | None = None) -> list[int]:
        """Return the tokens of a prompt, with chat template and generation header.

        Args:
            prompt: text or messages, images included.
            tools: what the template lists as the student's tools.
        """
        if isinstance(prompt, str):
            return list(self.processing_class(text=[prompt])["input_ids"][0])
        tokens = self.processing_class.apply_chat_template(
            conversation=[prompt],
            tools=list(tools) if tools else None,
            chat_template=self.chat_template,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            **self.chat_template_kwargs,
        )
        return list(tokens["input_ids"][0])

    def _set_signature_columns_if_needed(self) -> None:
        """Keep the teacher's column where ``remove_unused_columns`` is set."""
        super()._set_signature_columns_if_needed()
        if "privileged_context" not in self._signature_columns:
            self._signature_columns.append("privileged_context")


def _observation(completion: Any) -> str | None:
    """Return the text of a completion's last tool turn, or None where it has none."""
    if isinstance(completion, str):
        return None
    contents = [turn["content"] for turn in completion if turn.get("role") == "tool"]
    if not contents:
        return None
    last = contents[-1]
    if isinstance(last, str):
        return last
    return "".join(part["text"] for part in last if part.get("type") == "text")
