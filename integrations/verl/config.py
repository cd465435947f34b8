"""Settings of a distillation loss in verl: verl's own and the library's, checked together.

``distillation.distillation_loss._target_=fused_sd.integrations.verl.config.FusedSDLossConfig``
"""

from dataclasses import dataclass, fields
from typing import Any

from verl.workers.config import DistillationLossConfig

from fused_sd import FULL_VOCABULARY, Jsd, MixedKl, StudentTopK, TeacherTopK, UnionTopK, checks
from fused_sd.combinations import DIVERGENCES, check_combination
from fused_sd.divergence import Divergence
from fused_sd.evidence import Evidence, EvidenceSchedule
from fused_sd.integrations.verl import RLSD_LOSS, TOPK_LOSS
from fused_sd.support import Support

SUPPORTS = {
    "full": ("full", None),
    "student_topk": ("student", StudentTopK),
    "teacher_topk": ("teacher", TeacherTopK),
    "union_topk": ("union", UnionTopK),
}
TEACHERS = ("server", "live", "ema", "synced", "reference")

# settings that only one loss reads, and settings read only beside a certain other one
_READ_BY = {
    TOPK_LOSS: (
        "divergence",
        "beta",
        "forward_weight",
        "support",
        "remainder",
        "tail_floor",
        "entry_clip",
        "token_clip",
        "importance_cap",
    ),
    RLSD_LOSS: (
        "rlsd_mix",
        "rlsd_mix_warmup_steps",
        "rlsd_mix_hold_steps",
        "rlsd_mix_decay_steps",
        "rlsd_clip_low",
        "rlsd_clip_high",
        "rlsd_log_prob",
        "rlsd_dual_clip",
    ),
}
_READ_WITH = {
    "beta": ("divergence", ("jsd",)),
    "forward_weight": ("divergence", ("mixed_kl",)),
    "ema_rate": ("teacher", ("ema",)),
    "teacher_sync_steps": ("teacher", ("ema", "synced")),
    "trust_region_mix": ("teacher", ("reference",)),
}


@dataclass
class FusedSDLossConfig(DistillationLossConfig):
    """verl's settings of a distillation loss, and the library's.

    verl's names keep verl's meaning; a setting that the chosen loss does not read is an error.

    Args:
        loss_mode: ``"fused_sd_topk"``: the divergence below, of each response token.
            ``"fused_sd_rlsd"``: the policy loss whose advantages a teacher reweights.  Or one of
            verl's own, which reads none of the settings below but backend and chunk_size.
        topk: entries of the support; as many as the teacher's server sends, where it teaches.
        log_prob_min_clamp: lower bound of both sides' log-probabilities, with remainder="drop" and
            teacher="server".
        clip_ratio_low, clip_ratio_high: of RLSD's policy ratio (its official code: 0.2, 0.28).
        divergence: ``"forward_kl"`` KL(t||s), ``"reverse_kl"`` KL(s||t), ``"jsd"`` with ``beta``
            or ``"mixed_kl"`` with ``forward_weight``.
        beta: the teacher's weight in the JSD's mixture, in (0, 1).
        forward_weight: share of KL(t||s) in the mixed KL.
        support: ``"teacher_topk"``, which are the server's ids where it teaches; with a teacher in
            the training process also ``"student_topk"``, ``"union_topk"`` and ``"full"``.
        remainder, tail_floor, entry_clip: as in ``fused_sd.divergence_loss``.
        token_clip: upper bound of each token's divergence.  verl's ``loss_max_clamp`` is one too,
            but its metrics tell the loss before it.
        importance_cap: multiplies each token by ``min(pi / pi_old, cap)`` (SDPO); None: not.
        teacher: ``"server"``: verl's teacher servers.  In the training process: ``"live"``, the
            student's own weights; ``"ema"``, their moving average; ``"synced"``, a copy of them,
            made anew now and then; ``"reference"``, the initial weights.
        ema_rate: the student's share in each average, with teacher="ema".
        teacher_sync_steps: optimiser steps from one average or copy to the next, with
            teacher="ema" or "synced" (RLSD: 10 in the paper, 20 in its script).
        trust_region_mix: the student's share in the teacher's logits, with teacher="reference"
            (SDPO's trust region); 0: the reference alone.
        rlsd_mix, rlsd_clip_low, rlsd_clip_high, rlsd_log_prob: mix, clip and log_prob of
            ``fused_sd.Evidence``.
        rlsd_mix_warmup_steps, rlsd_mix_hold_steps, rlsd_mix_decay_steps: of
            ``fused_sd.EvidenceSchedule``, in verl's training steps; with fused_sd's trainer, which
            knows them.
        rlsd_dual_clip: bound c > 1 on the loss of tokens with A' < 0; None: no bound.
        backend, chunk_size: as in ``fused_sd.divergence_loss``.

    Raises:
        ValueError: a value is out of its range, settings do not go together, or one is given that
            is not read.
    """

    loss_mode: str = TOPK_LOSS
    loss_max_clamp: float | None = None
    log_prob_min_clamp: float | None = None
    use_policy_gradient: bool = False

    divergence: str = "forward_kl"
    beta: float = 0.5
    forward_weight: float = 0.5
    support: str = "teacher_topk"
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
        from fused_sd.integrations.verl import plugin  # which imports this module

        plugin.register_losses()  # verl's own check looks the loss up, and may load no plugins
        super().__post_init__()
        checks.check_one_of("teacher", self.teacher, TEACHERS)
        checks.check_unit_interval("ema_rate", self.ema_rate)
        checks.check_positive_int("teacher_sync_steps", self.teacher_sync_steps)
        checks.check_unit_interval("trust_region_mix", self.trust_region_mix)
        checks.check_backend_choice(self.backend)
        if self.chunk_size is not None:
            checks.check_positive_int("chunk_size", self.chunk_size)
        self._check_read()
        if self.loss_mode == TOPK_LOSS:
            self._check_topk()
        elif self.loss_mode == RLSD_LOSS:
            self._check_rlsd()
        elif self.teacher != "server":
            checks.fail(
                "teacher",
                f'be "server" with verl\'s loss_mode={self.loss_mode!r}',
                repr(self.teacher),
                f"pass loss_mode={TOPK_LOSS!r} or {RLSD_LOSS!r}",
            )

    def to_settings(self) -> dict[str, Any]:
        """The divergence, as keywords of ``divergence_loss`` and ``topk_divergence_loss``."""
        return {
            "divergence": self.to_divergence(),
            "remainder": self.remainder,
            "tail_floor": self.tail_floor,
            "entry_clip": self.entry_clip,
            "token_clip": self.token_clip,
        }

    def to_divergence(self) -> Divergence:
        if self.divergence == "jsd":
            return Jsd(self.beta)
        if self.divergence == "mixed_kl":
            return MixedKl(self.forward_weight)
        return self.divergence

    def to_support(self) -> Support:
        """The entries compared with a teacher in the training process."""
        kind = SUPPORTS[self.support][1]
        return FULL_VOCABULARY if kind is None else kind(self.topk)

    def to_evidence(self) -> Evidence:
        """RLSD's reweighting of the advantages."""
        clip = (self.rlsd_clip_low, self.rlsd_clip_high)
        return Evidence(clip, self.rlsd_mix, self.rlsd_log_prob)  # type: ignore[arg-type]

    def to_schedule(self) -> EvidenceSchedule | None:
        """RLSD's mix over the training steps; None: it is constant."""
        steps = self.rlsd_mix_warmup_steps, self.rlsd_mix_hold_steps, self.rlsd_mix_decay_steps
        schedule = EvidenceSchedule(self.rlsd_mix, *steps)
        return schedule if any(steps) else None

    def _check_read(self) -> None:
        """Refuse a setting that nothing reads."""
        for loss, names in _READ_BY.items():
            if loss != self.loss_mode:
                self._check_left(names, f"loss_mode={self.loss_mode!r}")
        for name, (other, values) in _READ_WITH.items():
            if getattr(self, other) not in values:
                self._check_left((name,), f"{other}={getattr(self, other)!r}")
        if self.loss_mode in _READ_BY:
            self._check_left(("use_chunked_topk",), "a loss that holds no logits")
            read = (self.loss_mode, self.remainder, self.teacher)
            if read != (TOPK_LOSS, "drop", "server"):
                self._check_left(("log_prob_min_clamp",), f"{', '.join(map(repr, read))}")

    def _check_left(self, names: tuple[str, ...], where: str) -> None:
        defaults = {field.name: field.default for field in fields(self)}
        for name in names:
            if getattr(self, name) != defaults[name]:
                checks.fail(
                    name,
                    f"be left as it is with {where}, which does not read it",
                    repr(getattr(self, name)),
                    f"leave it at {defaults[name]!r}",
                )

    def _check_topk(self) -> None:
        checks.check_one_of("divergence", self.divergence, DIVERGENCES)
        checks.check_one_of("support", self.support, SUPPORTS)
        self.to_divergence()  # checks beta and forward_weight
        if self.teacher == "server" and self.support != "teacher_topk":
            checks.fail(
                "support",
                'be "teacher_topk" with teacher="server", which sends its own top-k alone',
                repr(self.support),
                'pass teacher="live", "ema", "synced" or "reference" to compare other entries',
            )
        if self.support != "full":
            checks.check_positive_int("topk", self.topk)
        check_combination(
            self.divergence,
            "entries" if self.teacher == "server" else SUPPORTS[self.support][0],
            self.remainder,
            entry_clip=self.entry_clip is not None,
            tail_floor=self.tail_floor is not None,
            log_prob_floor=self.log_prob_min_clamp is not None,
        )
        for name in ("tail_floor", "entry_clip", "token_clip", "importance_cap", "loss_max_clamp"):
            if getattr(self, name) is not None:
                checks.check_positive(name, getattr(self, name), "pass null to leave it out")
        if self.log_prob_min_clamp is not None and not self.log_prob_min_clamp < 0:
            got = self.log_prob_min_clamp
            checks.fail("log_prob_min_clamp", "be below 0", got, "verl's own default is -10")
        if self.token_clip is not None and self.loss_max_clamp is not None:
            both = f"{self.token_clip} beside loss_max_clamp={self.loss_max_clamp}"
            checks.fail("token_clip", "be a token's only upper bound", both, "pass one of them")
        if self.use_policy_gradient:
            checks.fail(
                "use_policy_gradient",
                "be False: a divergence summed over the vocabulary does not depend on the sampled "
                "token, so that its expected policy gradient is 0",
                True,
                "pass False, or loss_mode=k1, which is of the sampled token",
            )

    def _check_rlsd(self) -> None:
        self.to_evidence()
        checks.check_ratio_clip((self.clip_ratio_low, self.clip_ratio_high))
        self._check_left(("clip_ratio",), "RLSD (clip_ratio_low and clip_ratio_high bound it)")
        if self.rlsd_dual_clip is not None and not self.rlsd_dual_clip > 1:
            bound = self.rlsd_dual_clip
            checks.fail("rlsd_dual_clip", "be above 1", bound, "RLSD uses 3.0; null is no bound")
        why = {
            "use_task_rewards": "RLSD holds the task's advantages, and verl would add its policy "
            "loss of the same advantages",
            "use_policy_gradient": "RLSD is a policy loss, and verl would take it for a reward",
        }
        for name, reason in why.items():
            if getattr(self, name):
                checks.fail(name, f"be False: {reason}", True, f"pass {name}=False")
        if self.loss_max_clamp is not None:
            checks.fail(
                "loss_max_clamp",
                "be null: cutting the surrogate's value would stop its gradient",
                self.loss_max_clamp,
                "RLSD's bounds are clip_ratio_low, clip_ratio_high and rlsd_dual_clip",
            )


def settings_of(loss_config: DistillationLossConfig) -> FusedSDLossConfig:
    """The configuration of one of our losses, which verl's own class cannot be.

    Raises:
        ValueError: the configuration is verl's.
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
