"""The base of the methods' trainers: TRL's ``GRPOTrainer`` with a teacher and another loss.

TRL does the rollouts, tools, environments, images, rewards, buffering, logging and checkpoints, and
knows vLLM, PEFT and accelerate.  A method is one file: it sets ``config_cls`` and what it needs,
and overrides

* ``teacher_prompts``: the tokens that the teacher reads before a completion (or it puts
  ``PrivilegedPrompt`` before this base);
* ``score_teacher``: runs the teacher, and returns what the loss needs of its forward; the default
  returns the teacher's states and head;
* ``method_loss``: the loss, called with hidden states and head inside the student's forward.

``tests/integrations/with_trl/test_new_method.py`` is an example.

The bases and ``compute_loss`` override methods of TRL (read in 1.16) and transformers (in 5.24);
``tests/integrations/test_seams.py`` names the one where another release differs.

Dimension key:  B sequences, T completion tokens, D hidden size
"""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import ProcessorMixin

from fused_sd import LMHead, LossOutput
from fused_sd.checks import fail
from fused_sd.integrations.shared import completion_scores as completion
from fused_sd.integrations.shared.as_it_was import left_as_it_was
from fused_sd.integrations.shared.rollouts import Rollout
from fused_sd.integrations.trl import observe
from fused_sd.integrations.trl.batches import FEEDBACK_METHOD, FeedbackFunction, RolloutBatches
from fused_sd.integrations.trl.config import SelfDistillationConfig
from fused_sd.integrations.trl.credit_maps import CreditMapCallback
from fused_sd.integrations.trl.data_checks import DataChecks, check_config
from fused_sd.integrations.trl.fused_grpo import FusedGRPOTrainer, model_inputs
from fused_sd.integrations.trl.reduction import loss_type_weights
from fused_sd.integrations.trl.reward_functions import check_weights, function_list
from fused_sd.integrations.trl.teacher_contexts import TeacherContexts
from fused_sd.integrations.trl.teachers import TeacherOwner

Inputs = dict[str, Any]  # a micro-batch, as TRL makes it
Options = dict[str, Any]  # keywords that every loss of fused_sd takes


class SelfDistillationTrainer(DataChecks, RolloutBatches, TeacherOwner, FusedGRPOTrainer):
    """Base of the methods' trainers.

    A mixture of experts trains without its router's auxiliary loss.

    Args:
        model: a causal language model, with images or without, its name or its folder.
        reward_funcs: TRL's reward functions, which return finite numbers, and None or NaN for no
            verdict.  Methods that read no rewards do not need any.
        args: the method's configuration.
        train_dataset: has a column ``prompt``, and ``privileged_context`` with what only the
            teacher may see, if the method reads it; ``image`` or ``images`` for both sides.
        others, kwargs: the further arguments of TRL's ``GRPOTrainer``, such as ``tools``,
            ``environment_factory`` and ``rollout_func``.
        feedback_func: is called as a reward function is, and returns what the environment says of
            each completion, or None.  Without it an environment's ``get_feedback`` is asked.

    Raises:
        ValueError: rewards or data are missing or malformed, or the head cannot be reproduced.

    Examples:
        >>> import fused_sd
        >>> from fused_sd.integrations.trl import RFTConfig, SelfDistillationTrainer
        >>> class Imitation(SelfDistillationTrainer):
        ...     config_cls, has_teacher, needs_rewards = RFTConfig, False, False
        ...
        ...     def method_loss(self, hidden, head, teacher, inputs, options):
        ...         token_ids = inputs["completion_ids"]
        ...         return fused_sd.cross_entropy_loss(hidden, head, token_ids, **options)
    """

    args: Any  # the method's configuration
    model: Any
    train_dataset: Any

    config_cls: ClassVar[Any] = SelfDistillationConfig
    _name = "Self-distillation"
    _tag_names: ClassVar[list[str]] = ["trl", "fused_sd"]
    _paper: ClassVar[dict[str, str]] = {}  # otherwise TRL's model cards would cite GRPO's paper
    is_swap = False  # TRL does not have these losses
    needs_rewards: ClassVar[bool] = True
    needs_privileged: ClassVar[bool] = False
    metrics: ClassVar[tuple[str, ...]] = ()  # names for the loss, computed where ``observe`` is set

    def __init__(
        self,
        model: str | nn.Module,
        reward_funcs: Any = None,
        args: SelfDistillationConfig | None = None,
        train_dataset: Any = None,
        *others: Any,
        feedback_func: FeedbackFunction | None = None,
        **kwargs: Any,
    ) -> None:
        name = type(self).__name__
        if args is None:
            args = self.config_cls(f"{name}-output")
        check_config(name, args, self.config_cls)
        functions = function_list(reward_funcs)
        check_weights(args.reward_weights, len(functions))
        if self.needs_rewards and not (functions or kwargs.get("environment_factory")):
            fail("reward_funcs", f"be given to {name}", "none", "it learns from verified rollouts")
        self.feedback_func = feedback_func
        # GRPOTrainer refuses to have no reward; this one is taken out again below.
        given = functions if functions or self.needs_rewards else [_no_reward]
        with left_as_it_was(model):
            super().__init__(model, given, args, train_dataset, *others, **kwargs)
            if args.padding_free and isinstance(self.processing_class, ProcessorMixin):
                got = f"True with a {type(self.processing_class).__name__}"
                fail("padding_free", "be False for a model with images", got, "leave it out")
            self._drop_absent_rewards()
            self._hide_feedback_from_tools()
            self._make_teacher()
            if self.has_teacher and self.args.credit_map_steps:
                self.add_callback(CreditMapCallback(self, every=self.args.credit_map_steps))
            self.teacher_contexts = TeacherContexts(self)

    # What a method chooses

    def reads_privileged(self, args: Any) -> bool:
        """Return whether the dataset must have a column ``privileged_context``."""
        return self.needs_privileged

    def teacher_prompts(self, rollout: Rollout) -> list[int] | None:
        """Return the tokens that the teacher reads before the completion.

        None: there is nothing to teach; the rollout gets weight 0 if the method needs a signal.
        """
        raise NotImplementedError

    def context_flags(self, rollout: Rollout) -> dict[str, bool]:
        """Return what is logged of a rollout's context, as shares of all rollouts, by name."""
        return {}

    def scalar_metrics(self) -> dict[str, float]:
        """Return numbers to log beside the loss's, by name."""
        return {}

    def score_teacher(self, inputs: Inputs) -> Any:
        """Run the teacher, and return what the loss needs: here its hidden states and its head."""
        return self.run_teacher(inputs, completion.with_head(self._teacher_outlives_forward()))

    def method_loss(
        self, hidden: Tensor, head: LMHead, teacher: Any, inputs: Inputs, options: Options
    ) -> LossOutput:
        """Return the loss of a micro-batch.

        Args:
            hidden: the completions' states (B, T, D).
            head: the student's output head.
            teacher: what ``score_teacher`` returned.
            inputs: the micro-batch: TRL's batch with teacher_input_ids, loss_mask, advantages and,
                where a batch is trained on more than once or vLLM's rollouts are corrected,
                old_per_token_logps; without it the current policy sampled.
            options: keywords to pass on to the loss.  A method that multiplies token_weights scales
                the returned token_loss too, because that is logged.
        """
        raise NotImplementedError

    # The loss

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Inputs,
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Tensor:
        """Run the teacher, then the student with the loss inside its forward.

        ``num_items_in_batch`` is not read: the weights have their own counts of tokens.
        """
        if return_outputs:
            fail("return_outputs", "be False", True, "a fused loss has no outputs")
        teacher = self.score_teacher(inputs)
        options = {
            "token_weights": self.token_weights(inputs),
            "reduction": "sum",
            "temperature": self.temperature,
            "metrics": self.metrics if self.args.observe else (),
            **self.args.gradient_options,
        }
        student = completion.CompletionForward(
            model,
            torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1),
            torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1),
            inputs["completion_ids"].size(1),
            padding_free=self.args.padding_free,
            more_inputs=model_inputs(inputs),
        )
        output = student(
            lambda hidden, head: self.method_loss(hidden, head, teacher, inputs, options)
        )
        observe.record(self, output, inputs)
        # TRL sets loss_is_scaled_for_ga, so that Trainer does not divide by the number of
        # micro-batches.
        return output.loss / (self.current_gradient_accumulation_steps if model.training else 1)

    # What the methods share

    def token_advantages(self, inputs: Inputs) -> Tensor:
        """Return each sequence's advantage at all of its tokens, (B, T)."""
        return inputs["advantages"][:, None].expand(inputs["completion_ids"].shape)

    def rollout_correction(self, inputs: Inputs) -> Tensor | None:
        """Return the ratio of the old policy to the rollout engine, (B, T) or (B, 1), or None.

        TRL computes it where vLLM samples, by ``vllm_importance_sampling_mode``.
        """
        return inputs.get("importance_sampling_ratio")

    def token_weights(self, inputs: Inputs, mask: Tensor | None = None) -> Tensor:
        """Return weights (B, T) whose weighted sum is the average that ``loss_type`` names.

        The rollout correction multiplies the weights, not the counts that they divide by.

        Args:
            inputs: the micro-batch.
            mask: the tokens to average over; None: the loss mask.
        """
        mask = inputs["loss_mask"] if mask is None else mask
        whole = inputs["num_loss_tokens"] if mask is inputs["loss_mask"] else inputs["num_tokens"]
        steps = self.args.steps_per_generation if self.model.training else 1
        weights = loss_type_weights(
            mask,
            self.args.loss_type,
            step_tokens=whole / (steps * self.accelerator.num_processes),
            max_length=self.args.max_completion_length,
            dtype=torch.promote_types(self.model.dtype, torch.float32),
        )
        correction = self.rollout_correction(inputs)
        return weights if correction is None else weights * correction

    def sampled_mask(self, inputs: Inputs) -> Tensor:
        """Return the tokens (B, T) that the model wrote, whatever the method learns from."""
        mask, tools = inputs["completion_mask"], inputs.get("tool_mask")
        return mask if tools is None else mask * tools

    @property
    def num_rollout_batches(self) -> int:
        """How many batches of rollouts have been trained on; at most one for each optimizer step.

        From ``global_step``, which a resumed run continues.
        """
        steps, args = self.state.global_step, self.args
        passes = args.steps_per_generation * self.num_iterations
        return min(steps, steps * args.gradient_accumulation_steps // passes)

    def tools_of(self, index: int) -> Sequence[Any]:
        """Return the tools that the prompt of this process's rollout offers."""
        if self.environment_factories is None:
            return list(self.tools or ())
        return list(self._env_tools[self._batch_environments[index]])

    def _phase(self, model: nn.Module) -> str:
        return "train" if model.training else "eval"

    def _drop_absent_rewards(self) -> None:
        """Take out the reward that stands for none; an environment's own rewards stay."""
        kept = [n for n, function in enumerate(self.reward_funcs) if function is not _no_reward]
        if len(kept) == len(self.reward_funcs):
            return
        for name in ("reward_funcs", "reward_func_names", "reward_processing_classes"):
            values = getattr(self, name)
            setattr(self, name, [values[n] for n in kept])
        self.reward_weights = self.reward_weights[kept] if kept else torch.zeros(1)

    def _hide_feedback_from_tools(self) -> None:
        """TRL offers the model all public methods of an environment as tools."""
        if self.environment_factories is None:
            return
        for name, tools in self._env_tools.items():
            self._env_tools[name] = [tool for tool in tools if tool.__name__ != FEEDBACK_METHOD]
        self.tools = [tool for tool in self.tools if tool.__name__ != FEEDBACK_METHOD]


def _no_reward(completions: list[Any], **_: Any) -> list[float]:
    return [0.0] * len(completions)
