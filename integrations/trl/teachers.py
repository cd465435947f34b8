"""The teacher in a trainer: it moves once for each batch of rollouts, and is saved and loaded.

(What is said of Trainer was read in transformers 5.24, of DeepSpeed in 0.19.)
"""

import math
import os
import warnings
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback
from trl.models import prepare_deepspeed, prepare_fsdp

from fused_sd import Teacher
from fused_sd.checks import fail
from fused_sd.integrations.shared.adapter_teacher import make_teacher
from fused_sd.integrations.shared.completion_scores import CompletionForward
from fused_sd.integrations.transformers import ATTACHMENT, attach, unwrap
from fused_sd.integrations.trl.checkpoints import WholeCheckpoints
from fused_sd.integrations.trl.fused_grpo import model_inputs
from fused_sd.teaching.teacher import Kind

TEACHER_FILE = "teacher.pt"
KINDS: dict[str, Kind] = {  # by ``teacher_model_kind``
    "live": "live",
    "base": "frozen",
    "ema": "ema",
    "synced": "synced",
    "trust_region": "frozen",  # the reference; DivergenceTrainer mixes the student in
}


def teacher_head_is_resharded(trainer: Any, teacher: nn.Module, student: nn.Module) -> bool:
    """Return whether the teacher's head must be copied to be whole in the student's forward.

    Args:
        trainer: a transformers Trainer, which knows whether parameters are sharded.
        teacher, student: models, wrapped or not.
    """
    is_sharded = trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled
    return is_sharded and unwrap(teacher) is not unwrap(student)


def gradients_are_finite(model: nn.Module) -> Tensor:
    """Return whether no gradient of this process holds an infinite or NaN value: () bool."""
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    local = [g.to_local() if isinstance(g, DTensor) else g for g in gradients]
    local = [gradient for gradient in local if gradient.numel()]  # a shard may be empty
    if not local:
        return torch.tensor(True)
    # one fused call instead of a kernel for each parameter
    sizes = torch._foreach_norm(local, torch.inf)
    return torch.stack([size.to(local[0].device) for size in sizes]).isfinite().all()


class TeacherCallback(TrainerCallback):
    """Moves the teacher once for each batch of rollouts, and leaves out steps of bad gradients.

    A batch of rollouts is trained on in ``steps_per_generation`` x ``num_iterations`` micro-steps.
    The official code of SDPO moves its teacher after all of them, and so does this, however many
    optimizer steps they make.  Where a step covers several batches, the teacher moves after it.  A
    resumed run starts with a new batch, as TRL's rollouts do.

    Steps with an infinite or NaN gradient are left out, as in that code: the teacher moves unless
    all steps of the batch were.  Trainer offers no way to skip a step, but its
    ``on_pre_optimizer_step`` comes after clipping and right before ``optimizer.step()``: gradients
    that are removed there change no parameter and no moment.  Under DeepSpeed the step is over by
    then; DeepSpeed itself leaves such steps out.

    Args:
        trainer: a trainer of TRL that makes rollouts; its ``teacher`` may be None.
        skip: whether to leave such steps out.
    """

    def __init__(self, trainer: Any, *, skip: bool) -> None:
        self.trainer, self.skip = trainer, skip
        self.finite = self.left_out = self.follows = False
        self.num_skipped = self.num_batches = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.num_batches, self.follows = self._num_finished(args), False

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        accelerator = self.trainer.accelerator
        if self.trainer.is_deepspeed_enabled:
            engine = accelerator.deepspeed_engine_wrapped.engine
            self.left_out = not engine.was_step_applied()
            self.finite = not self.left_out and _is_norm(engine.get_global_grad_norm())
        else:
            flag = gradients_are_finite(kwargs["model"]).to(accelerator.device)
            # Sharded gradients may be bad on one process only; all have to skip the same steps.
            self.finite = bool(accelerator.gather(flag[None]).all())
            # In fp16 a gradient scaler leaves such a step out anyway, and lowers its scale for the
            # infinities that it finds: they have to stay.
            has_scaler = accelerator.scaler is not None
            self.left_out = not self.finite and (self.skip or has_scaler)
            if self.left_out and not has_scaler:
                kwargs["optimizer"].zero_grad()
        self.num_skipped += self.left_out

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # not a student that took a bad step
        self.follows = self.finite or (self.left_out and self.follows)
        num_batches = self._num_finished(args)
        if num_batches == self.num_batches:
            return
        if self.trainer.teacher is not None:
            self.trainer.teacher.update(finite=self.follows)
        self.num_batches, self.follows = num_batches, False

    def _num_finished(self, args: Any) -> int:
        """Return how many batches of rollouts all micro-steps have been made of."""
        return self.trainer._step // (args.steps_per_generation * args.num_iterations)


def _is_norm(value: float | None) -> bool:
    """Return whether a gradient norm of DeepSpeed, which has none in some setups, is finite."""
    # releases differ in what they report for an overflow: inf or -1
    return value is None or 0 <= float(value) < math.inf


def save_teacher(teacher: Teacher, folder: str, *, writes: bool) -> None:
    """Write a teacher's state, with whole weights, into a checkpoint's folder.

    All processes have to call it, because gathering a shard is collective.

    Args:
        writes: whether this process writes.
    """
    state = teacher.state_dict()
    weights = {}
    for name, whole in teacher.whole_weights():
        if writes:
            weights[name] = whole.cpu()
    if writes:
        torch.save({**state, "weights": weights}, os.path.join(folder, TEACHER_FILE))


def load_teacher(teacher: Teacher, folder: str) -> None:
    """Load the state that ``save_teacher`` wrote.

    Checkpoints of TRL's own trainers have none.  A teacher that follows the student then starts as
    a copy of it, as in the verl integration.
    """
    path = os.path.join(folder, TEACHER_FILE)
    if os.path.exists(path):
        teacher.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    elif teacher.kind in ("ema", "synced"):
        warnings.warn(
            f"the checkpoint {folder} holds no teacher: the teacher starts as its student is, and "
            "not where the saved run's teacher was",
            stacklevel=2,
        )
        teacher.sync()


class TeacherOwner(WholeCheckpoints):
    """The part of ``SelfDistillationTrainer`` that makes, runs, saves and loads its teacher."""

    has_teacher: ClassVar[bool] = True
    teacher: Teacher | None = None

    def run_teacher(self, inputs: dict[str, Any], compute: Any, *, prefix: str = "teacher_") -> Any:
        """Run the teacher, and return what ``compute`` returns for the completions' states.

        Args:
            inputs: the micro-batch, with the teacher's prompts before the completions.
            compute: is called with states (B, T, D) and the teacher's head.
            prefix: of the names of the teacher's sequences in ``inputs``.
        """
        assert self.teacher is not None
        with self.teacher.acting() as module:
            if unwrap(module) is unwrap(self.model):
                module = self.model  # FSDP1 gathers the root's weights in its own forward alone
            forward = CompletionForward(
                module,
                inputs[f"{prefix}input_ids"],
                inputs[f"{prefix}attention_mask"],
                inputs["completion_ids"].size(1),
                padding_free=self.args.padding_free,
                more_inputs=model_inputs(inputs, prefix),
            )
            return forward(compute)

    def _make_teacher(self) -> None:
        """Make the teacher, before accelerate shards the student: that happens in training."""
        args = self.args
        if self.has_teacher:
            # TRL's loss head keeps the student's forward in a closure: a copy would run the student
            own = vars(unwrap(self.model))
            set_aside = {name: own.pop(name) for name in ("forward", ATTACHMENT) if name in own}
            try:
                self.teacher = make_teacher(
                    self.model,
                    kind=KINDS[args.teacher_model_kind],
                    rate=args.teacher_update_rate,
                    every=args.teacher_sync_steps,
                )
            finally:
                own.update(set_aside)
            self._shard_teacher(self.teacher)
        self.teacher_model = self.model if self.teacher is None else self.teacher.module
        # accelerate never prepares the teacher, whose requests need the autocast that is passed.
        attach(self.teacher_model, autocast=self.accelerator.autocast)
        self._teacher_callback = TeacherCallback(self, skip=args.skip_nonfinite_gradients)
        self.add_callback(self._teacher_callback)

    def _save_beside(self, folder: str) -> None:
        """Save the teacher too: without it a resumed run would teach with the wrong weights."""
        super()._save_beside(folder)
        if self.teacher is not None:
            save_teacher(self.teacher, folder, writes=self.args.should_save)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Load the teacher too.

        Trainer loads the student in ``_load_from_checkpoint``, which it does not call under
        DeepSpeed.  This method it calls whenever it resumes, once the model is sharded.
        """
        super()._load_optimizer_and_scheduler(checkpoint)
        if self.teacher is not None and checkpoint is not None:
            load_teacher(self.teacher, checkpoint)

    def _teacher_outlives_forward(self) -> bool:
        """Return whether the teacher's head must be copied to be whole in the student's forward.

        FSDP1 wraps the student into another module; a live teacher's head is then copied too.
        """
        is_sharded = self.is_fsdp_enabled or self.is_deepspeed_enabled
        return is_sharded and self.teacher_model is not self.model

    def _shard_teacher(self, teacher: Teacher) -> None:
        """Shard a copy of the student as accelerate is going to shard the student.

        Each EMA step pairs the two sides' shards, which therefore have to lie alike.
        """
        is_copy = teacher.module is not self.model
        if self.is_deepspeed_enabled and is_copy:
            # Its hooks gather the weights in a forward; an engine that is deleted removes them.
            self._teacher_engine = prepare_deepspeed(teacher.module, self.accelerator)
        if not self.is_fsdp_enabled:
            return
        # FSDP1 flattens a layer's parameters together, so that the two sides' do not lie alike.
        is_first = self.accelerator.state.fsdp_plugin.fsdp_version == 1
        if is_first and teacher.state_dict()["weights"]:
            kind = self.args.teacher_model_kind
            remedy = 'set fsdp_config={"version": 2}, or teacher_model_kind="live"'
            fail("fsdp_config", f'have version 2 for teacher_model_kind="{kind}"', 1, remedy)
        if is_copy:
            prepare_fsdp(teacher.module, self.accelerator)
