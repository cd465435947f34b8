"""The stage in verl's trainer that shows the teacher what the student did not see.

trainer.v1.trainer_mode=fused_sd_sync

After the rewards and advantages are known, each sample's group, feedback or reference becomes a
prompt for the teacher, and the teacher's sequences join the batch (see ``privileged``).  Everything
else is verl's.  No teacher server is started: the teacher lives in the training workers.
"""

import copy
from collections.abc import Iterator
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
from fused_sd.integrations.verl.contexts import PromptTokenizer
from fused_sd.integrations.verl.privileged import (
    TeacherBatch,
    lengths_of,
    rows_of,
    taught_tokens,
    teacher_batch,
)
from fused_sd.integrations.verl.samples import FIELDS, rollouts_of
from fused_sd.integrations.verl.self_distillation import SelfDistillationConfig
from fused_sd.integrations.verl.worker_scores import WorkerScores


class SelfDistillationStage(WorkerScores):
    """Put before one of verl's trainers."""

    verl_mode: str

    def __init__(self, config: DictConfig) -> None:
        own = copy.deepcopy(config)
        own.trainer.v1.trainer_mode = self.verl_mode  # by which verl's trainer knows what it is
        self.self_distillation = self_distillation_config(own)
        super().__init__(own)  # type: ignore[call-arg]
        self.use_teacher_policy = False
        # the rollout workers are made from the caller's: they are to ask no teacher server
        config.distillation.enabled = False

    def _init_resource_pool_mgr(self) -> None:
        with _switched(self.config.distillation, enabled=False):  # no GPUs for servers
            super()._init_resource_pool_mgr()

    def _setup(self) -> None:
        super()._setup()
        self.distillation_config = self.self_distillation
        self._check_reference_worker()
        settings = dict(self.config.data.get("apply_chat_template_kwargs", {}))
        if getattr(self.train_dataset, "tool_schemas", None) is not None:
            settings["tools"] = self.train_dataset.tool_schemas
        self.prompt_tokenizer = PromptTokenizer(self.tokenizer, settings)

    def _compute_advantage(self, batch: KVBatchMeta, metrics: dict[str, Any]) -> KVBatchMeta:
        batch = super()._compute_advantage(batch, metrics)
        with marked_timer("teacher_context", self.timing_raw, color="olive"):
            return self._add_teacher(batch, metrics)

    def _add_teacher(self, batch: KVBatchMeta, metrics: dict[str, Any]) -> KVBatchMeta:
        """Write the teacher's sequences, and what says which tokens it teaches."""
        config = self.self_distillation
        path = () if config.reference_key is None else (config.reference_key.split(".")[0],)
        data = tq.kv_batch_get(
            keys=batch.keys,
            partition_id=batch.partition_id,
            select_fields=[*FIELDS, *path, "old_log_probs", "multi_modal_inputs"],
        )
        _refuse_images(data)
        rollouts = rollouts_of(
            data,
            batch.keys,
            self.tokenizer,
            reference_key=config.reference_key,
            feedback_key=config.feedback_key,
        )
        is_sample = [not tag.get("is_padding", False) for tag in batch.tags]
        given = [rollout if there else None for rollout, there in zip(rollouts, is_sample)]
        if config.check_prompts:
            _check_prompts(given, self.prompt_tokenizer)
        contexts = [
            None
            if rollout is None
            else config.context.teacher_prompt(rollout, self.prompt_tokenizer)
            for rollout in given
        ]
        teacher = teacher_batch(
            rows_of(data["prompts"]),
            rows_of(data["responses"]),
            contexts,
            max_prompt_length=config.max_prompt_length,
        )
        metrics.update(_metrics(teacher, sum(is_sample)))
        if config.scored_by == "worker":
            scores = self._worker_scores(batch, data, teacher)
            fields = {
                "teacher_logprobs": scores,
                "self_distillation_mask": teacher.mask,
            }
        else:
            fields = teacher.fields()
        schedule = config.loss.to_schedule()
        if schedule is not None:
            schedule.num_steps = self.global_steps - 1  # verl's first update is step 1
            metrics["self_distillation/evidence_mix"] = schedule.value
            fields[EVIDENCE_MIX] = torch.full((len(batch),), schedule.value)
        if not config.is_policy_loss:
            # verl divides by the tokens of loss_mask, and takes extremes over response_mask
            fields["loss_mask"] = taught_tokens(data["response_mask"], teacher.mask)
        return tq.kv_batch_put(
            keys=batch.keys,
            partition_id=batch.partition_id,
            fields=TensorDict(fields, batch_size=len(batch)),
        )


class SelfDistillationSync(SelfDistillationStage, PPOTrainerSync):
    """verl's synchronous trainer with a teacher's context."""

    verl_mode = "sync"


class SelfDistillationColocateAsync(SelfDistillationStage, PPOTrainerColocateAsync):
    """verl's colocated asynchronous trainer with a teacher's context."""

    verl_mode = "colocate_async"


TRAINERS = {
    "fused_sd_sync": SelfDistillationSync,
    "fused_sd_colocate_async": SelfDistillationColocateAsync,
}


def register() -> None:
    """Put the trainers into verl's registry, where ``trainer.v1.trainer_mode`` finds them.

    Raises:
        ValueError: a name is another plugin's.
    """
    for name, trainer in TRAINERS.items():
        register_trainer(name)(trainer)


def self_distillation_config(config: DictConfig) -> SelfDistillationConfig:
    """The checked settings of a whole verl configuration.

    Raises:
        ValueError: they are verl's own, are switched off or do not go together.
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


def _check_prompts(rollouts: list[Rollout | None], tokenizer: PromptTokenizer) -> None:
    """Make sure that the teacher's prompt differs from the student's by the context alone."""
    rollout = next((rollout for rollout in rollouts if rollout is not None), None)
    if rollout is None:
        return
    own = tokenizer.chat(rollout.prompt)
    if own != rollout.prompt_ids:
        fail(
            "raw_prompt",
            "be tokenised by the teacher as it was by the rollout",
            f"{len(own)} tokens {own[:8]}... and {len(rollout.prompt_ids)} tokens "
            f"{rollout.prompt_ids[:8]}...",
            "give both the same data.apply_chat_template_kwargs; set "
            "distillation.check_prompts=False for an agent loop that writes its own prompts",
        )


def _refuse_images(data: TensorDict) -> None:
    name = "multi_modal_inputs"
    if name in data.keys() and any(data[name]):  # noqa: SIM118  a TensorDict iterates over rows
        fail(
            name,
            "be empty: the teacher's prompt is text",
            "images or videos",
            "leave them out of the dataset",
        )


def _metrics(teacher: TeacherBatch, num_samples: int) -> dict[str, float]:
    num_taught = float(teacher.mask.sum())
    return {
        "self_distillation/context_fraction": num_taught / max(num_samples, 1),
        "self_distillation/truncated_fraction": teacher.num_truncated / max(num_taught, 1),
        "self_distillation/teacher_length": float(lengths_of(teacher.input_ids).float().mean()),
    }


@contextmanager
def _switched(section: DictConfig, **values: Any) -> Iterator[None]:
    """A section of the configuration with other values for a while."""
    before = {name: section[name] for name in values}
    with open_dict(section):
        section.update(values)
        try:
            yield
        finally:
            section.update(before)
