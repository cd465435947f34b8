"""Settings of self-distillation in verl: its distillation settings, without teacher servers.

distillation._target_=fused_sd.integrations.verl.self_distillation.SelfDistillationConfig
"""

from dataclasses import dataclass
from typing import Any

from verl.workers.config import DistillationConfig

from fused_sd.checks import check_one_of, check_positive_int, fail
from fused_sd.integrations.verl import RLSD_LOSS
from fused_sd.integrations.verl.config import FusedSDLossConfig, settings_of

SCORED_BY = ("engine", "worker")


@dataclass
class SelfDistillationConfig(DistillationConfig):
    """verl's distillation settings where the model that is trained teaches itself.

    The servers' settings (teacher_models, nnodes, teacher_key) are not read.

    Args:
        distillation_loss: a FusedSDLossConfig whose ``teacher`` is not ``"server"``.
        context: what the teacher is shown; see ``contexts``.
        max_prompt_length: tokens of the teacher's prompt; a longer one loses its beginning.
        reference_key: where a dataset row holds the reference that a context shows, a path such as
            ``"extra_info.answer"``; null: nowhere.
        feedback_key: where the reward function's result holds feedback; null: nowhere.
        check_prompts: make sure, once a batch, that the teacher's tokenisation of a prompt without
            context is the student's.  Off for agent loops that write prompts of their own.
        scored_by: of RLSD, ``"engine"``: the teacher's log-probabilities are formed beside the
            student's in the update, by fused_sd's engine.  ``"worker"``: before it, by verl's
            log-probability pass of the policy (teacher="live") or of its reference worker
            (teacher="reference"); any engine will do.

    Raises:
        ValueError: a value is out of its range, or settings do not go together.
    """

    context: Any = None
    max_prompt_length: int = 10240
    reference_key: str | None = "reward_model.ground_truth"
    feedback_key: str | None = "feedback"
    check_prompts: bool = True
    scored_by: str = "engine"

    def __post_init__(self) -> None:
        # verl's own reads the servers' settings alone
        self.teacher_models: dict[str, Any] = {}
        loss = self.loss
        if loss.teacher == "server":
            fail(
                "distillation_loss.teacher",
                "not be a server, which has the student's prompt alone",
                "'server'",
                'pass "live", "ema" or "reference", or use verl\'s own DistillationConfig',
            )
        if not callable(getattr(self.context, "teacher_prompt", None)):
            fail(
                "distillation.context",
                "say what the teacher is shown",
                repr(self.context),
                "set distillation.context._target_=fused_sd.integrations.verl.contexts."
                "SiblingContext, ReferenceContext or AttemptContext",
            )
        check_positive_int("max_prompt_length", self.max_prompt_length)
        check_one_of("scored_by", self.scored_by, SCORED_BY)
        if self.scored_by == "worker":
            self._check_worker()

    @property
    def loss(self) -> FusedSDLossConfig:
        return settings_of(self.distillation_loss)

    @property
    def is_policy_loss(self) -> bool:
        """Whether samples without a context have a loss all the same."""
        return self.loss.loss_mode == RLSD_LOSS or self.loss.use_task_rewards

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
