"""The settings that all methods share.

The methods' configurations extend TRL's ``GRPOConfig`` (1.12 to 1.16), so that TRL's command line,
its rollouts, vLLM, tools and logs work as in GRPO.  GRPOConfig has settings of GRPO's loss that a
method does not read; its configuration lists them in ``unread``, and giving one is an error.
"""

from collections.abc import Sequence
from dataclasses import MISSING, dataclass, field, fields
from typing import Any, ClassVar

from trl import GRPOConfig

from fused_sd.checks import (
    check_non_negative,
    check_one_of,
    check_positive,
    check_positive_int,
    check_unit_interval,
    fail,
)
from fused_sd.integrations.trl.sparse_gradients import GradientSettings

LOSS_TYPES = ("bnpo", "dapo", "grpo", "dr_grpo")
TEACHERS = ("live", "base", "ema", "synced")  # of every method
# settings of GRPO's loss that no method reads
GRPO_SETTINGS = (
    "beta",
    "cast_lm_head_to_fp32",  # the losses form fp32 logits from a head in any dtype
    "entropy_coef",
    "entropy_coef_delta",
    "entropy_coef_max",
    "entropy_coef_min",
    "entropy_target",
    "importance_sampling_level",
    "multi_objective_aggregation",
    "off_policy_mask_threshold",
    "ref_model_mixup_alpha",
    "ref_model_sync_steps",
    "router_aux_loss_coef",
    "sapo_temperature_neg",
    "sapo_temperature_pos",
    "sync_ref_model",
    "top_entropy_quantile",
    "use_adaptive_entropy",
    "use_bias_correction_kl",
    "vespo_k_neg",
    "vespo_k_pos",
    "vespo_lambda_neg",
    "vespo_lambda_pos",
)
# settings of the clipped policy loss, of which some methods read none
POLICY_SETTINGS = ("epsilon", "epsilon_high", "delta", "scale_rewards", "advantage_epsilon")


@dataclass
class SelfDistillationConfig(GradientSettings, GRPOConfig):
    """Base of the methods' configurations: TRL's settings of GRPO, and a few more.

    TRL's names keep TRL's meaning, with two extensions.

    ``loss_type`` reduces every loss, not only the policy's.  ``"bnpo"`` is the mean over the
    micro-batch's tokens, ``"dapo"`` that over the tokens of the whole accumulated batch on all
    processes, ``"grpo"`` the mean of all sequences' means; ``"dr_grpo"`` divides the sum by the
    number of sequences times ``max_completion_length``.

    ``num_generations`` may be 1 where the method compares no rollouts of a group.

    Raises:
        ValueError: a value is out of its range, or a setting is given that the method does not
            read.
    """

    unread: ClassVar[tuple[str, ...]] = GRPO_SETTINGS
    """TRL's settings that the method does not read."""

    # of the official runs, but OPSD's and SDFT's
    lr_scheduler_type: str = field(
        default="constant_with_warmup", metadata={"help": "Learning rate schedule."}
    )
    weight_decay: float = field(default=0.01, metadata={"help": "AdamW's weight decay."})
    loss_type: str = field(
        default="dapo", metadata={"help": f"Average of the token losses: {', '.join(LOSS_TYPES)}."}
    )
    vllm_importance_sampling_correction: bool = field(
        default=False,
        metadata={"help": "Multiply a token's loss by the ratio of the old policy to vLLM."},
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
        metadata={
            "help": "Run the backbone on sequences packed into one row, without padding; not for "
            "batches with images."
        },
    )
    skip_nonfinite_gradients: bool = field(
        default=True,
        metadata={
            "help": "Leave out an optimizer step whose gradient is infinite or NaN; the teacher "
            "moves if any step of the batch of rollouts was made."
        },
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
        check_positive_int("num_generations", self.num_generations)
        if self.max_grad_norm is None:  # Trainer compares it with 0
            rule, remedy = "be a number", "0 clips nothing"
            fail("max_grad_norm", rule, self.max_grad_norm, remedy)
        size = int(self.num_generations or 0)
        if size == 1:
            self.num_generations = _GroupOfOne(size)
        super().__post_init__()
        self.num_generations = size
        _check_generation(self.generation_kwargs)
        check_one_of("loss_type", self.loss_type, LOSS_TYPES)
        check_one_of("scale_rewards", self.scale_rewards, ("group", "batch", "none"))
        if size == 1 and self.scale_rewards == "group":
            fail(
                "num_generations",
                'be at least 2 where rewards are scaled by their group (scale_rewards="group")',
                1,
                'sample more, or pass scale_rewards="none"',
            )


class _GroupOfOne(int):
    """The number 1, which TRL's ``num_generations < 2`` lets pass.

    GRPO needs two rollouts of a prompt to compare; a divergence from a teacher needs one.
    """

    def __lt__(self, other: int) -> bool:
        return False


@dataclass
class TokenCorrection:
    """Mixin before a configuration: the correction for vLLM of most official runs.

    Each token's ratio of the old policy to the rollout engine multiplies its loss, cut at 2.
    """

    vllm_importance_sampling_correction: bool = field(
        default=True,
        metadata={"help": "Multiply a token's loss by the ratio of the old policy to vLLM."},
    )
    vllm_importance_sampling_mode: str = field(
        default="token_truncate", metadata={"help": "How the ratio to vLLM is cut."}
    )
    vllm_importance_sampling_clip_max: float | None = field(
        default=2.0, metadata={"help": "Where the ratio to vLLM is cut."}
    )


@dataclass
class TeacherSettings:
    """Mixin before a configuration: the settings of a method with a teacher.

    ``teacher_model_kind`` is ``"live"`` (the student itself), ``"base"`` (the initial weights),
    ``"ema"`` (a moving average), ``"synced"`` (a hard copy every ``teacher_sync_steps``) or, in
    methods that compare distributions, ``"trust_region"``, which mixes the initial weights' and the
    student's log-probabilities at ``teacher_update_rate``.

    Raises:
        ValueError: a value is out of its range.
    """

    teachers: ClassVar[tuple[str, ...]] = TEACHERS
    """Values of ``teacher_model_kind``; a loss between distributions adds ``"trust_region"``."""

    teacher_model_kind: str = field(
        default="ema", metadata={"help": "Whose weights teach; see the class."}
    )
    teacher_update_rate: float = field(
        default=0.05, metadata={"help": "Share of the student in each update of an average."}
    )
    teacher_sync_steps: int = field(
        default=1, metadata={"help": "Batches of rollouts from one update to the next."}
    )
    max_reprompt_len: int = field(
        default=10240,
        metadata={"help": "Longest teacher prompt in tokens; a longer one loses its beginning."},
    )
    credit_map_steps: int = field(
        default=0, metadata={"help": "Write credit maps every this many steps; 0 writes none."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()  # of the configuration that this stands before
        check_one_of("teacher_model_kind", self.teacher_model_kind, self.teachers)
        check_positive_int("max_reprompt_len", self.max_reprompt_len)
        check_unit_interval("teacher_update_rate", self.teacher_update_rate)
        check_positive_int("teacher_sync_steps", self.teacher_sync_steps)
        check_non_negative("credit_map_steps", self.credit_map_steps, "0 writes none")


def check_pair(name: str, values: Sequence[float]) -> None:
    """Refuse a pair of bounds that is not two numbers; a command line gives a list."""
    if not isinstance(values, Sequence) or len(values) != 2:
        fail(name, "hold two numbers, the lower and the upper", repr(values), "give both")


def check_bounds(config: Any, *names: str) -> None:
    """Refuse a bound of a configuration that is neither None nor above 0."""
    for name in names:
        if getattr(config, name) is not None:
            check_positive(name, getattr(config, name), "pass None for no bound")


def _check_generation(settings: Any) -> None:
    """Refuse generation settings that change how many completions a call returns, or in what."""
    legal = {"num_return_sequences": 1, "n": 1, "return_dict_in_generate": False}
    for name, value in legal.items():
        given = (settings or {}).get(name)
        if given is not None and given != value:
            rule, remedy = f"be {value}", "num_generations says how many completions a prompt has"
            fail(f"generation_kwargs[{name!r}]", rule, repr(given), remedy)


def _default(setting) -> object:  # type: ignore[no-untyped-def]  # a dataclass field
    return setting.default if setting.default is not MISSING else setting.default_factory()
