"""The settings that all methods share.

The methods' configurations extend TRL's ``SDPOConfig`` (1.6 to 1.16), so that TRL's command line,
vLLM and generation settings work.  SDPOConfig has settings that a method does not read; its
configuration lists them in ``unread``, and giving one is an error.
"""

from collections.abc import Sequence
from dataclasses import MISSING, dataclass, field, fields
from typing import ClassVar, Literal

from trl.experimental.sdpo import SDPOConfig as StockSDPOConfig

from fused_sd.checks import check_one_of, check_positive_int, fail
from fused_sd.integrations.trl.sparse_gradients import GradientSettings

LOSS_TYPES = ("bnpo", "dapo", "grpo", "dr_grpo")
TEACHERS = ("live", "base", "ema", "synced")  # of every method
# groups of settings, of which some methods read none
DIVERGENCE_SETTINGS = (
    "distillation_alpha",
    "distillation_mode",
    "distillation_topk",
    "distillation_is_clip",
    "distillation_add_tail",
    "distillation_weight",
)
SIBLING_SETTINGS = (
    "use_successful_as_teacher",
    "dont_reprompt_on_self_success",
    "include_environment_feedback",
    "environment_feedback_only_without_solution",
    "solution_template",
    "feedback_template",
    "remove_thinking_from_demonstration",
)
TEACHER_SETTINGS = ("teacher_model_kind", "teacher_update_rate", "teacher_sync_steps")
POLICY_SETTINGS = ("epsilon", "epsilon_high", "scale_rewards", "advantage_epsilon")


@dataclass
class SelfDistillationConfig(GradientSettings, StockSDPOConfig):
    """Base of the methods' configurations: TRL's settings of SDPO, and a few more.

    TRL's names keep TRL's meaning, with two extensions.

    ``loss_type`` reduces every loss, not only the policy's.  ``"bnpo"`` is the mean over the
    micro-batch's tokens, ``"dapo"`` that over the tokens of the whole accumulated batch on all
    processes, ``"grpo"`` the mean of all sequences' means; ``"dr_grpo"`` divides the sum by the
    number of sequences times ``max_completion_length``.

    ``teacher_model_kind`` may also be ``"synced"``, a hard copy every ``teacher_sync_steps`` steps,
    or, in methods that compare distributions, ``"trust_region"``, which mixes the initial weights'
    and the student's log-probabilities at ``teacher_update_rate``.

    Raises:
        ValueError: a value is out of its range, or a setting is given that the method does not
            read.
    """

    unread: ClassVar[tuple[str, ...]] = (
        "beta",
        "importance_sampling_level",
        "use_teacher_server",
    )
    """TRL's settings that the method does not read."""

    teachers: ClassVar[tuple[str, ...]] = TEACHERS
    """Values of ``teacher_model_kind``; a loss between distributions adds ``"trust_region"``."""

    distillation_mode: Literal["sampled_token", "full_logits", "topk_logits"] = field(
        default="full_logits", metadata={"help": "Only SDPO reads this."}
    )
    advantage_epsilon: float = field(
        default=1e-6,
        metadata={"help": "Added to the rewards' standard deviation where advantages are scaled."},
    )
    observe: bool = field(
        default=True,
        metadata={
            "help": "Compute and log entropies, KLs, masses and ratios beside the loss; without "
            "them a loss over a renormalised top-k needs fewer logits."
        },
    )
    padding_free: bool = field(
        default=False,
        metadata={"help": "Run the backbone on sequences packed into one row, without padding."},
    )
    skip_nonfinite_gradients: bool = field(
        default=True,
        metadata={
            "help": "Leave out the optimizer step and the teacher's update where a gradient is "
            "infinite or NaN."
        },
    )
    credit_map_steps: int = field(
        default=0, metadata={"help": "Write credit maps every this many steps; 0 writes none."}
    )

    def __post_init__(self) -> None:
        # Before TRL's __post_init__, which gives values to settings that were left out.
        for setting in fields(self):
            if setting.name in self.unread and getattr(self, setting.name) != _default(setting):
                fail(
                    setting.name,
                    f"be left as it is in {type(self).__name__}, whose method does not read it",
                    repr(getattr(self, setting.name)),
                    f"leave it at {_default(setting)!r}",
                )
        super().__post_init__()
        check_one_of("loss_type", self.loss_type, LOSS_TYPES)
        check_one_of("teacher_model_kind", self.teacher_model_kind, self.teachers)
        check_positive_int("max_reprompt_len", self.max_reprompt_len)
        check_one_of("scale_rewards", self.scale_rewards, ("group", "batch", "none"))
        if self.num_generations == 1 and self.scale_rewards == "group":
            fail(
                "num_generations",
                'be at least 2 where rewards are scaled by their group (scale_rewards="group")',
                1,
                'sample more, or pass scale_rewards="none"',
            )


def check_pair(name: str, values: Sequence[float]) -> None:
    """Refuse a pair of bounds that is not two numbers; a command line gives a list."""
    if len(values) != 2:
        fail(name, "hold two numbers, the lower and the upper", values, "give both")


def _default(setting) -> object:  # type: ignore[no-untyped-def]  # a dataclass field
    return setting.default if setting.default is not MISSING else setting.default_factory()
