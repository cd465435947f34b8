"""The settings of a distillation loss in verl: verl's own and the library's, checked together.

Hydra builds them with
``distillation.distillation_loss._target_=fused_sd.integrations.verl.config.FusedSDLossConfig``.
"""

from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

from fused_sd.checks.extras import require

require("verl", "verl")

from verl.workers.config import DistillationLossConfig

from fused_sd import Comparison, Evidence, EvidenceSchedule, Options, checks
from fused_sd.integrations.verl import RLSD_LOSS, TOPK_LOSS
from fused_sd.integrations.verl.config_checks import (
    check_divergence,
    check_rlsd,
    check_unread,
    parameter_field,
)
from fused_sd.terms.divergence import DIVERGENCES, Divergence
from fused_sd.terms.support import NAMED_SUPPORTS, Support
from fused_sd.terms.surrogate import Surrogate


def _numbers(support: Any) -> list[str]:
    """Return the names of the numbers that a class of supports takes."""
    return [field.name for field in fields(support)]


# the library's names, but "student_topk" for "student" and so on
SUPPORTS = {
    f"{name}_topk" if _numbers(kind) == ["k"] else name: kind
    for name, kind in NAMED_SUPPORTS.items()
}
TEACHERS = ("server", "live", "ema", "synced", "reference", "worker_group")


@dataclass
class FusedSDLossConfig(DistillationLossConfig):
    """verl's distillation loss settings, extended by the library's.

    verl's names keep verl's meaning.  A setting that the chosen loss does not read is an error.

    Args:
        loss_mode: ``"fused_sd_topk"`` is the divergence below, at each response token.
            ``"fused_sd_rlsd"`` is a policy loss whose advantages a teacher reweights.  verl's own
            losses may be chosen, too; of the settings below they read backend and chunk_size only.
        topk: number of entries of the support; with a teacher server also the number it sends.
        log_prob_min_clamp: lower bound of both sides' log-probabilities in nats, below 0; read with
            remainder="drop" and teacher="server".
        clip_ratio_low, clip_ratio_high: bounds of RLSD's policy ratio (official code: 0.2, 0.28).
        divergence: ``"forward_kl"`` is KL(t||s), ``"reverse_kl"`` is KL(s||t), ``"jsd"`` is the
            Jensen-Shannon divergence with ``beta``, ``"mixed_kl"`` mixes both KLs by
            ``forward_weight``, and ``"skew_kl"`` is the skew KL divergence.
        beta: the teacher's weight in the JSD's mixture, in (0, 1).
        forward_weight: share of KL(t||s) in the mixed KL, in [0, 1].
        divergence_parameter: the parameter of a divergence without a setting of its own, such as
            the skew KL's student_weight; None: the default of its class, as ``fused_sd.SkewKl``.
        support: ``"teacher_topk"``, which for a teacher server are the ids that it sends.  A
            teacher in the training process may also have ``"student_topk"``, ``"union_topk"``,
            ``"teacher_nucleus"`` and ``"full"``.
        support_mass: probability that the entries of a teacher's nucleus reach together; it has at
            most topk entries.
        remainder, tail_floor, entry_clip: as in ``fused_sd.divergence_loss``.
        token_clip: upper bound of each token's divergence, in nats.  verl's ``loss_max_clamp`` is
            one as well, but verl logs the loss before that clamp.
        importance_cap: multiplies each token by ``min(pi / pi_old, cap)`` (SDPO); None: by 1.
        teacher: ``"server"`` for verl's teacher servers.  In the training process ``"live"`` is the
            student's own weights, ``"ema"`` their moving average, ``"synced"`` a copy that is
            renewed regularly, and ``"reference"`` the initial weights.
            ``"worker_group"`` is another model in workers of its own, which send its hidden states:
            see ``self_distillation.WorkerGroupConfig``.
        ema_rate: the student's share in each average, with teacher="ema".
        teacher_sync_steps: batches of rollouts between two averages or copies, with teacher="ema"
            or "synced" (RLSD: 10 in the paper, 20 in its script).
        trust_region_mix: the student's share in the teacher's logits, with teacher="reference"
            (SDPO's trust region); 0: the reference alone.
        rlsd_mix, rlsd_clip_low, rlsd_clip_high, rlsd_log_prob: mix, clip and log_prob of
            ``fused_sd.Evidence``.
        rlsd_mix_warmup_steps, rlsd_mix_hold_steps, rlsd_mix_decay_steps: of
            ``fused_sd.EvidenceSchedule``, in verl's training steps; they need fused_sd's trainer,
            because verl's losses do not know the step.
        rlsd_dual_clip: bound c > 1 on the loss of tokens with a negative advantage; None: no bound.
        backend, chunk_size: as in ``fused_sd.divergence_loss``.

    Raises:
        ValueError: a value is out of its range, settings do not go together, or a setting is given
            that nothing reads.
    """

    loss_mode: str = TOPK_LOSS
    loss_max_clamp: float | None = None
    log_prob_min_clamp: float | None = None
    use_policy_gradient: bool = False

    divergence: str = "forward_kl"
    beta: float = 0.5
    forward_weight: float = 0.5
    divergence_parameter: float | None = None
    support: str = "teacher_topk"
    support_mass: float = 0.95
    remainder: str = "tail"
    tail_floor: float | None = None
    entry_clip: float | None = None
    token_clip: float | None = None
    importance_cap: float | None = None

    teacher: str = "server"
    ema_rate: float = 0.05
    teacher_sync_steps: int = 1
    trust_region_mix: float = 0.0

    rlsd_mix: float = 0.5
    rlsd_mix_warmup_steps: int = 0
    rlsd_mix_hold_steps: int = 0
    rlsd_mix_decay_steps: int = 0
    rlsd_clip_low: float = 0.2
    rlsd_clip_high: float = 0.2
    rlsd_log_prob: str = "current"
    rlsd_dual_clip: float | None = 3.0

    backend: str = "auto"
    chunk_size: int | None = None

    def __post_init__(self) -> None:
        # verl's __post_init__ looks the loss up in its registry.  Register ours first, because verl
        # may have loaded no plugin (VERL_USE_EXTERNAL_PLUGINS=none).  The plugin imports this file.
        from fused_sd.integrations.verl import plugin

        plugin.register_losses()
        super().__post_init__()
        checks.check_one_of("teacher", self.teacher, TEACHERS)
        checks.check_unit_interval("ema_rate", self.ema_rate)
        checks.check_positive_int("teacher_sync_steps", self.teacher_sync_steps)
        checks.check_unit_interval("trust_region_mix", self.trust_region_mix)
        Options(backend=self.backend, chunk_size=self.chunk_size)  # checks both
        check_unread(self)
        if self.loss_mode == TOPK_LOSS:
            check_divergence(self)
        elif self.loss_mode == RLSD_LOSS:
            check_rlsd(self)
        elif self.teacher != "server":
            checks.fail(
                "teacher",
                f'be "server" with verl\'s loss_mode={self.loss_mode!r}',
                repr(self.teacher),
                f"pass loss_mode={TOPK_LOSS!r} or {RLSD_LOSS!r}",
            )

    @cached_property
    def comparison(self) -> Comparison:
        """What ``fused_sd_topk`` compares.  A server's ids stand for the teacher's top-k."""
        return Comparison(
            divergence=self._divergence(),
            support=self._support(),
            remainder=self.remainder,  # type: ignore[arg-type]
            tail_floor=self.tail_floor,
            log_prob_floor=self.log_prob_min_clamp,
            entry_clip=self.entry_clip,
            token_clip=self.token_clip,
        )

    def _divergence(self) -> Divergence:
        setting, name = DIVERGENCES[self.divergence].setting, parameter_field(self, self.divergence)
        if setting is None or name is None:
            return self.divergence
        parameter = getattr(self, name)
        made: Divergence = setting() if parameter is None else setting(parameter)
        return made

    def _support(self) -> Support:
        checks.check_one_of("support", self.support, SUPPORTS)
        kind, numbers = SUPPORTS[self.support], {"k": self.topk, "mass": self.support_mass}
        return kind(**{name: numbers[name] for name in _numbers(kind)})

    def to_evidence(self) -> Evidence:
        """Return RLSD's reweighting of the advantages."""
        clip = (self.rlsd_clip_low, self.rlsd_clip_high)
        return Evidence(clip, self.rlsd_mix, self.rlsd_log_prob)  # type: ignore[arg-type]

    def to_surrogate(self) -> Surrogate:
        """Return RLSD's clipped policy surrogate."""
        evidence = self.to_evidence()
        return Surrogate(
            ratio_clip=(self.clip_ratio_low, self.clip_ratio_high),
            dual_clip=self.rlsd_dual_clip,
            evidence_clip=evidence.clip,
            evidence_from_old=evidence.log_prob == "old",
        )

    def to_schedule(self) -> EvidenceSchedule | None:
        """Return RLSD's mix over the training steps; None if it is constant."""
        steps = self.rlsd_mix_warmup_steps, self.rlsd_mix_hold_steps, self.rlsd_mix_decay_steps
        schedule = EvidenceSchedule(self.rlsd_mix, *steps)
        return schedule if any(steps) else None


def require_own_config(loss_config: DistillationLossConfig) -> FusedSDLossConfig:
    """Return the settings of one of our losses, which verl's own class does not hold.

    Raises:
        ValueError: the settings are an instance of verl's class.
    """
    if not isinstance(loss_config, FusedSDLossConfig):
        target = f"{FusedSDLossConfig.__module__}.{FusedSDLossConfig.__qualname__}"
        checks.fail(
            "distillation.distillation_loss",
            f"be a FusedSDLossConfig for loss_mode={loss_config.loss_mode!r}",
            type(loss_config).__name__,
            f"set distillation.distillation_loss._target_={target}",
        )
    assert isinstance(loss_config, FusedSDLossConfig)
    return loss_config
