"""The settings of self-distillation in verl: its distillation settings without teacher servers.

Hydra builds them with
``distillation._target_=fused_sd.integrations.verl.self_distillation.SelfDistillationConfig``.
"""

from dataclasses import dataclass, field
from typing import Any

from verl.workers.config import DistillationConfig

from fused_sd.checks import check_one_of, check_positive_int, fail
from fused_sd.integrations.verl import RLSD_LOSS
from fused_sd.integrations.verl.config import FusedSDLossConfig, require_own_config

SCORED_BY = ("engine", "worker")
DTYPES = ("bf16", "fp16", "fp32")


@dataclass
class WorkerGroupConfig:
    """A frozen teacher in a worker group of its own, with ``teacher="worker_group"``.

    verl's ``distillation.nnodes`` and ``n_gpus_per_node`` are its GPUs.  Without nodes it runs on
    the student's, and its weights are on the CPU while it does not teach.

    Args:
        model_path: the teacher, of any size.  It must know the student's tokens by the same ids.
        max_token_len_per_gpu: most tokens of a forward; a longer sequence has one of its own.
        dtype: of its weights and of the states that it sends: ``"bf16"``, ``"fp16"`` or ``"fp32"``.
    """

    model_path: str | None = None
    max_token_len_per_gpu: int = 16384
    dtype: str = "bf16"

    def __post_init__(self) -> None:
        check_positive_int("worker_group.max_token_len_per_gpu", self.max_token_len_per_gpu)
        check_one_of("worker_group.dtype", self.dtype, DTYPES)


@dataclass
class SelfDistillationConfig(DistillationConfig):
    """verl's distillation settings for a model that teaches itself, or has a teacher of its own.

    It starts no teacher servers: ``teacher_models`` must be left out, and ``nnodes`` and
    ``n_gpus_per_node`` are read by ``worker_group`` alone.

    Args:
        distillation_loss: a FusedSDLossConfig whose ``teacher`` is not ``"server"``.
        context: builds what the teacher reads; see ``fused_sd.integrations.verl.contexts``.
        max_prompt_length: tokens of the teacher's prompt; a longer one loses its beginning.
        reference_key: dotted path to the reference that a context shows, inside a dataset row, such
            as ``"extra_info.answer"``; null: there is none.
        feedback_key: key of the feedback in the reward function's result; null: there is none.
        check_prompts: once a batch, compare the teacher's tokens of a prompt without context with
            the student's.  Switch it off for agent loops that write prompts of their own.
        scored_by: who computes RLSD's teacher log-probabilities.  ``"engine"``: fused_sd's engine,
            beside the student's, during the update.  ``"worker"``: verl's log-probability pass
            before the update, of the policy (teacher="live") or of its reference worker
            (teacher="reference"), with any engine.
        worker_group: the teacher with ``teacher="worker_group"``.

    Raises:
        ValueError: a value is out of its range, or settings do not go together.
    """

    context: Any = None
    max_prompt_length: int = 10240
    reference_key: str | None = "reward_model.ground_truth"
    feedback_key: str | None = "feedback"
    check_prompts: bool = True
    scored_by: str = "engine"
    worker_group: WorkerGroupConfig = field(default_factory=WorkerGroupConfig)

    def __post_init__(self) -> None:
        # verl's __post_init__ is not called: it demands teacher models, and GPUs for them.  verl's
        # defaults hold an empty teacher_model, which is dropped.
        self._check_servers()
        self.teacher_models: dict[str, Any] = {}
        loss = self.loss
        self._check_worker_group()
        if loss.teacher == "server":
            fail(
                "distillation_loss.teacher",
                "not be a server, which has the student's prompt alone",
                "'server'",
                'pass "live", "ema", "synced", "reference" or "worker_group", or use verl\'s own '
                "DistillationConfig",
            )
        if not callable(getattr(self.context, "teacher_prompt", None)):
            fail(
                "distillation.context",
                "say what the teacher is shown",
                repr(self.context),
                "set distillation.context._target_=fused_sd.integrations.verl.contexts."
                "SiblingContext, ReferenceContext, AttemptContext or SamePromptContext",
            )
        check_positive_int("max_prompt_length", self.max_prompt_length)
        check_one_of("scored_by", self.scored_by, SCORED_BY)
        if self.scored_by == "worker":
            self._check_worker()

    @property
    def loss(self) -> FusedSDLossConfig:
        """The loss's settings, typed."""
        return require_own_config(self.distillation_loss)

    @property
    def is_policy_loss(self) -> bool:
        """Whether samples without a context have a loss, too."""
        return self.loss.loss_mode == RLSD_LOSS or self.loss.use_task_rewards

    @property
    def has_worker_group(self) -> bool:
        """Whether the teacher is a model in a worker group of its own."""
        return self.loss.teacher == "worker_group"

    @property
    def has_own_pool(self) -> bool:
        """Whether that worker group has GPUs of its own."""
        return self.has_worker_group and self.nnodes > 0

    def _check_servers(self) -> None:
        """Refuse teacher servers, which nobody would start."""
        models = [getattr(model, "model_path", None) for model in self.teacher_models.values()]
        named = [str(model) for model in models if model is not None]
        if named:
            fail(
                "distillation.teacher_models",
                "be left out with SelfDistillationConfig, which starts no teacher servers",
                ", ".join(named),
                "leave them out; or distil from servers with --config-name=server, or from "
                "distillation.worker_group.model_path",
            )

    def _check_worker_group(self) -> None:
        """Refuse a worker group without a model, and a model without a worker group."""
        group, name = self.worker_group, "distillation.worker_group"
        if not self.has_worker_group:
            if group != WorkerGroupConfig():
                rule = "be left as it is unless it teaches"
                fail(name, rule, group, 'pass distillation_loss.teacher="worker_group"')
            return
        if not isinstance(group.model_path, str) or not group.model_path:
            rule = 'name the teacher of distillation_loss.teacher="worker_group"'
            fail(f"{name}.model_path", rule, repr(group.model_path), "pass a path or a name")

    def _check_worker(self) -> None:
        if self.loss.loss_mode != RLSD_LOSS:
            fail(
                "scored_by",
                'be "engine" for a divergence, which needs more than the sampled token',
                "'worker'",
                f"or pass loss_mode={RLSD_LOSS!r}",
            )
        if self.loss.teacher not in ("live", "reference") or self.loss.trust_region_mix:
            got = f"{self.loss.teacher!r}, trust_region_mix={self.loss.trust_region_mix}"
            rule = 'be "live" or "reference" with scored_by="worker"'
            fail("distillation_loss.teacher", rule, got, 'pass scored_by="engine"')
