"""verl's trainers with one more stage, which builds what the teacher reads.

``trainer.v1.trainer_mode=fused_sd_sync`` chooses the synchronous one.

The stage runs once rewards and advantages are known.  It turns each sample's group, feedback or
reference into a prompt for the teacher, and adds the teacher's sequences to the batch (see
``teacher_sequences``).  Everything else is verl's.  No teacher server is started: the teacher lives
in the training workers, or in a worker group of its own.
"""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import transfer_queue as tq
from omegaconf import DictConfig, open_dict
from tensordict import TensorDict
from transfer_queue import KVBatchMeta
from verl.trainer.ppo.v1 import PPOTrainerColocateAsync, PPOTrainerSync, register_trainer
from verl.utils.config import omega_conf_to_dataclass
from verl.utils.debug import marked_timer

from fused_sd.checks import fail
from fused_sd.integrations.shared.rollouts import Rollout
from fused_sd.integrations.verl import EVIDENCE_MIX
from fused_sd.integrations.verl.batch_rollouts import FIELDS, read_rollouts
from fused_sd.integrations.verl.contexts import PromptTokenizer
from fused_sd.integrations.verl.data_checks import check_feedback, check_reference
from fused_sd.integrations.verl.images import Vision
from fused_sd.integrations.verl.run_checks import check_run
from fused_sd.integrations.verl.self_distillation import SelfDistillationConfig
from fused_sd.integrations.verl.sessions import SessionPrompts, num_turn_tokens
from fused_sd.integrations.verl.teacher_group import TeacherGroup
from fused_sd.integrations.verl.teacher_sequences import (
    TeacherBatch,
    lengths_of,
    mask_without_context,
    teacher_batch,
)
from fused_sd.integrations.verl.worker_scores import WorkerScores


class SelfDistillationStage(TeacherGroup, WorkerScores):
    """A mixin for verl's trainers that adds the teacher's sequences after the advantages.

    verl's trainers know distillation from teacher servers only, and ``distillation.enabled`` turns
    on four things at once: the distillation loss in the training workers, which is wanted, and a
    resource pool, a server manager and requests from the rollout workers, which are not.
    """

    verl_mode: str
    _has_seen_feedback = False  # whether a batch was checked for it

    def __init__(self, config: DictConfig) -> None:
        check_run(config)
        own = copy.deepcopy(config)
        # verl's trainers compare the mode with their own names, to choose a replay buffer and more
        own.trainer.v1.trainer_mode = self.verl_mode
        self.self_distillation = self_distillation_config(own)
        super().__init__(own)  # type: ignore[call-arg]
        self.use_teacher_policy = False  # read by _setup, which would start the server manager
        # main_ppo builds the rollout workers from its own config, which is this object: switched
        # off, they ask no teacher server.  The training workers are built from the copy above.
        config.distillation.enabled = False

    def _init_resource_pool_mgr(self) -> None:
        # verl demands GPUs for the servers if distillation is enabled here
        enabled = self.self_distillation.has_own_pool  # verl makes such a pool for its servers
        with _temporarily(self.config.distillation, enabled=enabled):
            super()._init_resource_pool_mgr()
        if self.self_distillation.has_worker_group:
            self._place_teacher_group()

    def _init_dataloader(self) -> None:
        super()._init_dataloader()
        # here, because verl starts its workers next
        check_reference(self.train_dataset, self.self_distillation.reference_key)

    def _setup(self) -> None:
        super()._setup()
        # _setup leaves None here without servers, and _update_actor reads the loss's settings
        self.distillation_config = self.self_distillation
        self._check_reference_worker()
        if self.self_distillation.has_worker_group:
            self._start_teacher_group()
        # the teacher's prompts must be tokenised as verl's agent loop tokenised the student's
        settings = dict(self.config.data.get("apply_chat_template_kwargs", {}))
        if getattr(self.train_dataset, "tool_schemas", None) is not None:
            settings["tools"] = self.train_dataset.tool_schemas
        self.prompt_tokenizer = PromptTokenizer(self.tokenizer, settings, self.processor)

    @property
    def _vision_fields(self) -> tuple[str, ...]:
        """The columns that are read of a model with images; pixels only where they are sent on."""
        by_worker = self.self_distillation.scored_by == "worker"
        return ("position_ids", "multi_modal_inputs") if by_worker else ("position_ids",)

    def _compute_advantage(self, batch: KVBatchMeta, metrics: dict[str, Any]) -> KVBatchMeta:
        # verl's steps have no hook; this method is the last one before the update
        batch = super()._compute_advantage(batch, metrics)
        with marked_timer("teacher_context", self.timing_raw, color="olive"):
            return self._add_teacher(batch, metrics)

    def _add_teacher(self, batch: KVBatchMeta, metrics: dict[str, Any]) -> KVBatchMeta:
        """Add the teacher's sequences, or its scores, and the masks of what it teaches."""
        config = self.self_distillation
        path = () if config.reference_key is None else (config.reference_key.split(".")[0],)
        tokenizer = self.prompt_tokenizer
        sees = () if tokenizer.processor is None else self._vision_fields
        data = tq.kv_batch_get(
            keys=batch.keys,
            partition_id=batch.partition_id,
            select_fields=[*FIELDS, *path, "old_log_probs", *sees],
        )
        vision = None
        if tokenizer.processor is not None:
            ids = map(torch.cat, zip(data["prompts"].unbind(), data["responses"].unbind()))
            vision = Vision(tokenizer.processor, list(ids), data["position_ids"].unbind())
        if not self._has_seen_feedback:
            check_feedback(list(data["extra_fields"]), config.feedback_key)
            self._has_seen_feedback = True
        read = read_rollouts(
            data,
            batch.keys,
            self.tokenizer,
            reference_key=config.reference_key,
            feedback_key=config.feedback_key,
            thinking_tags=getattr(config.context, "thinking_tags", None),
            needs_verdicts=config.is_policy_loss,
            chat=tokenizer.chat,
        )
        # verl adds synthetic samples until its mini-batches divide the batch; nobody teaches them
        is_sample = [not tag.get("is_padding", False) for tag in batch.tags]
        rollouts = [rollout if real else None for rollout, real in zip(read, is_sample)]
        prompts = SessionPrompts(config.context, tokenizer)
        if config.check_prompts:
            prompts.check(rollouts, vision)
        contexts = [
            None if rollout is None else prompts.teacher_prompt(rollout) for rollout in rollouts
        ]
        teacher = teacher_batch(
            data["prompts"].unbind(),
            data["responses"].unbind(),
            contexts,
            max_prompt_length=config.max_prompt_length,
            num_turn_tokens=[num_turn_tokens(rollout) for rollout in read],
            vision=vision,
        )
        known = [rollout for rollout in rollouts if rollout is not None]
        metrics.update(_metrics(teacher, known, prompts.num_compacted))
        if config.scored_by == "worker":
            fields = {
                "teacher_logprobs": self._worker_scores(batch, data, teacher),
                "self_distillation_mask": teacher.mask,
            }
        else:
            fields = teacher.fields()
        schedule = config.loss.to_schedule()
        if schedule is not None:
            schedule.num_steps = self.global_steps - 1  # verl counts its steps from 1
            metrics["self_distillation/evidence_mix"] = schedule.value
            fields[EVIDENCE_MIX] = torch.full((len(batch),), schedule.value)
        # The engines divide the loss by the number of tokens in loss_mask, which verl's rollout
        # workers write.  Its rejection sampling clears rejected tokens in response_mask alone: they
        # would not learn, but count.
        fields["loss_mask"] = data["response_mask"]
        if not config.is_policy_loss:
            # response_mask stays as it is, so that verl's metrics are of all responses
            fields["loss_mask"] = mask_without_context(data["response_mask"], teacher.mask)
        batch = tq.kv_batch_put(
            keys=batch.keys,
            partition_id=batch.partition_id,
            fields=TensorDict(fields, batch_size=len(batch)),
        )
        if config.has_worker_group:
            batch = self._add_teacher_states(batch, data, teacher, metrics)
        return batch


class SelfDistillationSync(SelfDistillationStage, PPOTrainerSync):
    """verl's synchronous trainer with a teacher that reads a context."""

    verl_mode = "sync"


class SelfDistillationColocateAsync(SelfDistillationStage, PPOTrainerColocateAsync):
    """verl's colocated asynchronous trainer with a teacher that reads a context."""

    verl_mode = "colocate_async"


TRAINERS = {
    "fused_sd_sync": SelfDistillationSync,
    "fused_sd_colocate_async": SelfDistillationColocateAsync,
}


def register() -> None:
    """Put the trainers into verl's registry, where ``trainer.v1.trainer_mode`` finds them.

    verl accepts the same class twice.

    Raises:
        ValueError: a name is another plugin's.
    """
    for name, trainer in TRAINERS.items():
        register_trainer(name)(trainer)


def self_distillation_config(config: DictConfig) -> SelfDistillationConfig:
    """Build and check the self-distillation settings of a whole verl configuration.

    Raises:
        ValueError: the settings are verl's own class, are switched off or do not go together.
    """
    settings = omega_conf_to_dataclass(config.distillation)
    if not isinstance(settings, SelfDistillationConfig) or not settings.enabled:
        target = f"{SelfDistillationConfig.__module__}.{SelfDistillationConfig.__qualname__}"
        fail(
            "distillation",
            "be an enabled SelfDistillationConfig with this trainer",
            f"{type(settings).__name__}, enabled={settings.enabled}",
            f"set distillation._target_={target} and distillation.enabled=True",
        )
    assert isinstance(settings, SelfDistillationConfig)
    return settings


def _metrics(
    teacher: TeacherBatch, rollouts: Sequence[Rollout], num_compacted: int
) -> dict[str, float]:
    """Return what the samples were shown: the fractions of those that have a context, that have
    feedback, whose long context was cut or left out, and whose shortened history has no place for
    one; and the teacher's mean length.
    """
    num_samples, num_taught = max(len(rollouts), 1), float(teacher.mask.sum())
    num_told = sum(bool(rollout.feedback) for rollout in rollouts)
    return {
        "self_distillation/context_fraction": num_taught / num_samples,
        "self_distillation/feedback_available_fraction": num_told / num_samples,
        "self_distillation/truncated_fraction": teacher.num_truncated / max(num_taught, 1),
        "self_distillation/left_out_fraction": teacher.num_left_out / num_samples,
        "self_distillation/compacted_fraction": num_compacted / num_samples,
        "self_distillation/teacher_length": float(lengths_of(teacher.input_ids).float().mean()),
    }


@contextmanager
def _temporarily(section: DictConfig, **values: Any) -> Iterator[None]:
    """Give a section of the configuration other values while a with block runs."""
    before = {name: section[name] for name in values}
    with open_dict(section):
        section.update(values)
        try:
            yield
        finally:
            section.update(before)
