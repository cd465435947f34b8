"""The base of the methods' trainers: TRL's ``SDPOTrainer`` with other teachers and losses.

TRL does the rollouts, rewards, buffering, logging and checkpoints, and knows vLLM, PEFT and
accelerate.  A method is one file: it sets ``config_cls`` and what it needs, and overrides

* ``teacher_prompts``: the tokens that the teacher reads before a completion (or it puts
  ``PrivilegedPrompt`` before this base);
* ``score_teacher``: runs the teacher, and returns what the loss needs of its forward; the default
  returns the teacher's states and head;
* ``method_loss``: the loss, called with hidden states and head inside the student's forward.

``tests/integrations/with_trl/test_new_method.py`` is an example.

Everything under "TRL's seams", in ``RolloutBatches`` and in ``TeacherOwner`` overrides a method of
TRL or transformers.  The reasons given there were read in TRL 1.16 and transformers 5.24.
``tests/integrations/test_seams.py`` names the method where another release differs.

Dimension key:  B sequences, T completion tokens, D hidden size
"""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils.data import IterableDataset
from trl.experimental.sdpo import SDPOTrainer as StockSDPOTrainer

from fused_sd import LMHead, LossOutput
from fused_sd.checks import fail
from fused_sd.integrations.shared import completion_scores as completion
from fused_sd.integrations.shared.rollouts import Rollout
from fused_sd.integrations.trl import observe
from fused_sd.integrations.trl.batches import FeedbackFunction, RolloutBatches
from fused_sd.integrations.trl.config import SelfDistillationConfig
from fused_sd.integrations.trl.credit_maps import CreditMapCallback
from fused_sd.integrations.trl.drop_in import FusedSelfDistillationMixin
from fused_sd.integrations.trl.reduction import loss_type_weights
from fused_sd.integrations.trl.teacher_contexts import TeacherContexts
from fused_sd.integrations.trl.teachers import TeacherOwner

Inputs = dict[str, Any]  # a micro-batch, as TRL makes it
Options = dict[str, Any]  # keywords that every loss of fused_sd takes


class SelfDistillationTrainer(
    RolloutBatches, TeacherOwner, FusedSelfDistillationMixin, StockSDPOTrainer
):
    """Base of the methods' trainers.

    Args:
        model: a causal language model, its name or its folder.
        reward_funcs: TRL's reward functions.  Methods that read no rewards do not need any.
        args: the method's configuration.
        train_dataset: has a column ``prompt``, and ``privileged_context`` with what only the
            teacher may see, if the method reads it.
        others, kwargs: the further arguments of TRL's ``SDPOTrainer``.
        feedback_func: is called as a reward function is, and returns for each completion what the
            environment says about it, or None.

    Raises:
        ValueError: rewards or data that the method needs are missing, or the model's head cannot be
            reproduced.
    """

    args: Any  # the method's configuration
    model: Any
    train_dataset: Any
    teacher_context_builder: Any

    config_cls = SelfDistillationConfig
    _name = "Self-distillation"
    _tag_names: ClassVar[list[str]] = ["trl", "fused_sd"]
    _paper: ClassVar[dict[str, str]] = {}  # otherwise TRL's model cards would cite SDPO's paper
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
        if not isinstance(args, self.config_cls):
            wanted = self.config_cls.__name__
            fail("args", f"be a {wanted} for {name}", type(args).__name__, f"pass {wanted}(...)")
        has_rewards = reward_funcs is not None and reward_funcs != []
        if self.needs_rewards and not has_rewards:
            fail("reward_funcs", f"be given to {name}", "none", "it learns from verified rollouts")
        if isinstance(train_dataset, IterableDataset):
            got, remedy = type(train_dataset).__name__, "pass a datasets.Dataset"
            fail("train_dataset", "be indexed, for each prompt is drawn repeatedly", got, remedy)
        if self.reads_privileged(args) and train_dataset is not None:
            _check_privileged(name, train_dataset)
        self.feedback_func = feedback_func
        super().__init__(
            model,
            reward_funcs if has_rewards else [_no_reward],
            args,
            train_dataset,
            *others,
            **kwargs,
        )
        # SDPOTrainer.__init__ refuses to have no reward function, but trains without: with empty
        # lists all rewards are 0, and no reward of ours is logged.
        if not has_rewards:
            self.reward_funcs, self.reward_func_names = [], []
            self.reward_processing_classes, self.reward_weights = [], torch.zeros(0)
        if args.credit_map_steps:
            self.add_callback(CreditMapCallback(self, every=args.credit_map_steps))
        # SDPOTrainer.__init__ sets its own builder last.
        self.teacher_context_builder = TeacherContexts(self)

    # What a method chooses

    def reads_privileged(self, args: Any) -> bool:
        """Return whether the dataset must have a column ``privileged_context``."""
        return self.needs_privileged

    def teacher_prompts(self, rollout: Rollout) -> list[int] | None:
        """Return the tokens that the teacher reads before the completion.

        None: there is nothing to teach; the rollout gets weight 0 if the method needs a signal.
        """
        raise NotImplementedError

    def score_teacher(self, inputs: Inputs) -> Any:
        """Run the teacher, and return what the loss needs: here its hidden states and its head."""
        return self.run_teacher(
            inputs["teacher_input_ids"],
            inputs["teacher_attention_mask"],
            inputs,
            completion.with_head(self._teacher_outlives_forward()),
        )

    def method_loss(
        self, hidden: Tensor, head: LMHead, teacher: Any, inputs: Inputs, options: Options
    ) -> LossOutput:
        """Return the loss of a micro-batch.

        Args:
            hidden: the completions' states (B, T, D).
            head: the student's output head.
            teacher: what ``score_teacher`` returned.
            inputs: the micro-batch: TRL's batch with teacher_input_ids, loss_mask, advantages and,
                where a batch is trained on more than once, old_per_token_logps; without it the
                current policy sampled.
            options: keywords to pass on to the loss.  A method that multiplies token_weights scales
                the returned token_loss too, because that is logged.
        """
        raise NotImplementedError

    # TRL's seams

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Inputs,
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Tensor:
        """Run the teacher, then the student with the loss inside its forward.

        ``num_items_in_batch`` is None here: Trainer counts labels, and the batch has none.
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
        )
        output = student(
            lambda hidden, head: self.method_loss(hidden, head, teacher, inputs, options)
        )
        observe.record(self, output, inputs)
        # TRL sets loss_is_scaled_for_ga, so that Trainer does not divide by the number of
        # micro-batches.
        return output.loss / (self.current_gradient_accumulation_steps if model.training else 1)

    def _record_reward_diagnostics(self, *args: Any, **kwargs: Any) -> None:
        # TRL's method warns that rewards are flat, also where there are none.
        if self.reward_funcs:
            super()._record_reward_diagnostics(*args, **kwargs)

    def _warn_on_inactive_self_distillation(self, mode: str) -> None:
        # TRL's method reads counts of successful groups, which ``TeacherContexts`` does not make,
        # and would warn at each step.
        if self.has_teacher and not self.teacher_context_builder.num_with_signal:
            self._warn_on_degenerate_diagnostics(
                mode,
                "inactive_self_distillation",
                "No rollout of the batch has a teacher's signal.",
            )
        else:
            self._diagnostic_counters[mode]["inactive_self_distillation"] = 0

    # What the methods share

    def token_advantages(self, inputs: Inputs) -> Tensor:
        """Return each sequence's advantage at all of its tokens, (B, T)."""
        return inputs["advantages"][:, None].expand(inputs["completion_ids"].shape)

    def token_weights(self, inputs: Inputs, mask: Tensor | None = None) -> Tensor:
        """Return weights (B, T) whose weighted sum is the average that ``loss_type`` names.

        Args:
            inputs: the micro-batch.
            mask: the tokens to average over; None: the loss mask.
        """
        mask = inputs["loss_mask"] if mask is None else mask
        whole = inputs["num_loss_tokens"] if mask is inputs["loss_mask"] else inputs["num_tokens"]
        steps = self.args.steps_per_generation if self.model.training else 1
        return loss_type_weights(
            mask,
            self.args.loss_type,
            step_tokens=whole / (steps * self.accelerator.num_processes),
            max_length=self.args.max_completion_length,
            dtype=torch.promote_types(self.model.dtype, torch.float32),
        )


def _check_privileged(name: str, dataset: Any) -> None:
    columns = getattr(dataset, "column_names", None)
    if columns is not None and "privileged_context" not in columns:
        fail(
            "train_dataset",
            f"have a column privileged_context for {name}, what only the teacher may see",
            f"columns {', '.join(columns)}",
            "add the reference answer, solution or demonstration under that name",
        )


def _no_reward(completions: list[Any], **_: Any) -> list[float]:
    return [0.0] * len(completions)
