"""The trainer that every method is a choice in: a teacher's context, a teacher, and a loss.

Rollouts, rewards, buffering, logging, checkpoints, vLLM, PEFT and accelerate are TRL's
``SDPOTrainer``'s.  A method writes ``teacher_prompts`` (what the teacher reads), ``score_teacher``
(what is kept of its forward) and ``method_loss`` (called with hidden states and head inside the
student's forward).

Dimension key:  B sequences, T completion tokens, D hidden size
"""

import os
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils.data import IterableDataset
from trl.experimental.sdpo import SDPOTrainer as StockSDPOTrainer
from trl.models import prepare_fsdp

from fused_sd import LMHead, LossOutput
from fused_sd.checks import fail
from fused_sd.integrations.shared import completion_scores as completion
from fused_sd.integrations.shared.adapter_teacher import make_teacher
from fused_sd.integrations.shared.rollouts import Rollout
from fused_sd.integrations.transformers import attach
from fused_sd.integrations.trl import observe, teachers
from fused_sd.integrations.trl.batches import FeedbackFunction, RolloutBatches
from fused_sd.integrations.trl.config import SelfDistillationConfig
from fused_sd.integrations.trl.credit_maps import CreditMapCallback
from fused_sd.integrations.trl.drop_in import FusedSelfDistillationMixin
from fused_sd.integrations.trl.reduction import loss_type_weights
from fused_sd.integrations.trl.teacher_contexts import TeacherContexts
from fused_sd.teaching.teacher import Teacher

Run = dict[str, Any]


class SelfDistillationTrainer(RolloutBatches, FusedSelfDistillationMixin, StockSDPOTrainer):
    """Base of the methods' trainers.

    Args:
        reward_funcs: TRL's reward functions; needed by methods that read rewards.
        args: the method's configuration.
        feedback_func: called as a reward function is; returns for each completion what the
            environment says of it, or None.
        others: as TRL's ``SDPOTrainer``.  Dataset columns: ``prompt``, and ``privileged_context``
            with what only the teacher may see.

    Raises:
        ValueError: rewards, data or a teacher that the method needs are missing, or the model's
            head cannot be reproduced.
    """

    args: Any  # the method's configuration
    model: Any
    train_dataset: Any
    teacher_context_builder: Any

    config_cls = SelfDistillationConfig
    _name = "Self-distillation"
    _tag_names: ClassVar[list[str]] = ["trl", "fused_sd"]
    _paper: ClassVar[dict[str, str]] = {}  # model cards name none, rather than SDPO's
    needs_rewards: ClassVar[bool] = True
    needs_privileged: ClassVar[bool] = False
    has_teacher: ClassVar[bool] = True
    metrics: ClassVar[tuple[str, ...]] = ()  # what the loss forms where ``observe`` is set

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
        self.teacher: Teacher | None = None
        super().__init__(
            model,
            reward_funcs if has_rewards else [_no_reward],
            args,
            train_dataset,
            *others,
            **kwargs,
        )
        if not has_rewards:  # TRL insists on one
            self.reward_funcs, self.reward_func_names = [], []
            self.reward_processing_classes, self.reward_weights = [], torch.zeros(0)
        self.teacher_context_builder = TeacherContexts(self)

    # what a method chooses

    def reads_privileged(self, args: Any) -> bool:
        """Whether the dataset must have ``privileged_context``."""
        return self.needs_privileged

    def teacher_prompts(self, rollout: Rollout) -> list[int] | None:
        """Tokens that the teacher reads before the completion; None: no signal, weight 0."""
        raise NotImplementedError

    def score_teacher(self, inputs: dict[str, Any]) -> Any:
        """What the loss needs of the teacher: its states and head."""
        return self.run_teacher(
            inputs["teacher_input_ids"],
            inputs["teacher_attention_mask"],
            inputs,
            completion.with_head(self._teacher_outlives_forward()),
        )

    def method_loss(
        self, hidden: Tensor, head: LMHead, teacher: Any, inputs: dict[str, Any], run: Run
    ) -> LossOutput:
        """The loss, from the completion's states (B, T, D) and the head.

        Args:
            teacher: what ``score_teacher`` returned.
            run: token_weights, reduction, temperature, metrics, gradient and tolerance, for the
                loss function.
        """
        raise NotImplementedError

    # TRL's seams

    def _setup_teacher_model(self) -> None:
        args = self.args
        if self.has_teacher:
            self.teacher = make_teacher(
                self.model,
                kind=teachers.KINDS[args.teacher_model_kind],
                rate=args.teacher_update_rate,
                every=args.teacher_sync_steps,
            )
            self._shard_teacher(self.teacher.module)
        self.teacher_model = self.model if self.teacher is None else self.teacher.module
        for model in (self.model, self.teacher_model):
            attach(model, autocast=self.accelerator.autocast)
        self._teacher_callback = teachers.TeacherCallback(
            self.teacher, self.accelerator, skip=args.skip_nonfinite_gradients
        )
        self.add_callback(self._teacher_callback)
        if args.credit_map_steps:
            self.add_callback(CreditMapCallback(self, every=args.credit_map_steps))

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Tensor:
        if return_outputs:
            fail("return_outputs", "be False", True, "a fused loss has no outputs")
        teacher = self.score_teacher(inputs)
        run = {
            "token_weights": self.token_weights(inputs),
            "reduction": "sum",
            "temperature": self.temperature,
            "metrics": self.metrics if self.args.observe else (),
            **self.args.gradient_run,
        }
        student = completion.CompletionForward(
            model,
            torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1),
            torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1),
            inputs["completion_ids"].size(1),
            padding_free=self.args.padding_free,
        )
        output = student(lambda hidden, head: self.method_loss(hidden, head, teacher, inputs, run))
        observe.record(self, output, inputs)
        return output.loss / (self.current_gradient_accumulation_steps if model.training else 1)

    def _save_checkpoint(self, model: nn.Module, *args: Any, **kwargs: Any) -> None:
        super()._save_checkpoint(model, *args, **kwargs)
        folder = os.path.join(self.args.output_dir, f"checkpoint-{self.state.global_step}")
        if self.teacher is not None:
            teachers.save_teacher(self.teacher, folder, writes=self.args.should_save)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        # not with the student's weights, which DeepSpeed loads itself
        super()._load_optimizer_and_scheduler(checkpoint)
        if self.teacher is not None and checkpoint is not None:
            teachers.load_teacher(self.teacher, checkpoint)

    def _record_reward_diagnostics(self, *args: Any, **kwargs: Any) -> None:
        if self.reward_funcs:
            super()._record_reward_diagnostics(*args, **kwargs)

    def _warn_on_inactive_self_distillation(self, mode: str) -> None:
        if self.has_teacher and not self.teacher_context_builder.num_with_signal:
            self._warn_on_degenerate_diagnostics(
                mode,
                "inactive_self_distillation",
                "No rollout of the batch has a teacher's signal.",
            )
        else:
            self._diagnostic_counters[mode]["inactive_self_distillation"] = 0

    # what the methods share

    def run_teacher(
        self, input_ids: Tensor, attention_mask: Tensor, inputs: dict[str, Any], compute: Any
    ) -> Any:
        """What ``compute`` makes of the teacher's states (B, T, D) of the completions."""
        assert self.teacher is not None
        length = inputs["completion_ids"].size(1)
        with self.teacher.acting() as module:
            forward = completion.CompletionForward(
                module, input_ids, attention_mask, length, padding_free=self.args.padding_free
            )
            return forward(compute)

    def token_weights(self, inputs: dict[str, Any], mask: Tensor | None = None) -> Tensor:
        """Weights (B, T) whose sum is ``loss_type``'s average over one optimiser step."""
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

    def _teacher_outlives_forward(self) -> bool:
        is_sharded = self.is_fsdp_enabled or self.is_deepspeed_enabled
        return is_sharded and self.teacher_model is not self.model

    def _shard_teacher(self, module: nn.Module) -> None:
        """Shard a copy as the student is going to be when training starts."""
        if not self.is_fsdp_enabled or module is self.model:
            return
        if self.accelerator.state.fsdp_plugin.fsdp_version == 1:
            kind = self.args.teacher_model_kind
            remedy = 'set fsdp_config={"version": 2}, or teacher_model_kind="live", or train LoRA'
            fail("fsdp_config", f'have version 2 for teacher_model_kind="{kind}"', 1, remedy)
        prepare_fsdp(module, self.accelerator)


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
