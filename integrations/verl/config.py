"""Settings of a distillation loss in verl: verl's own and the library's, checked together.

``distillation.distillation_loss._target_=fused_sd.integrations.verl.config.FusedSDLossConfig``
"""

from dataclasses import dataclass
from typing import Any

from verl.workers.config import DistillationLossConfig

from fused_sd import FULL_VOCABULARY, Jsd, MixedKl, checks
from fused_sd.integrations.verl import RLSD_LOSS, TOPK_LOSS
from fused_sd.integrations.verl.config_checks import (
    SUPPORTS,
    check_divergence,
    check_read,
    check_rlsd,
)
from fused_sd.terms.divergence import Divergence
from fused_sd.terms.evidence import Evidence, EvidenceSchedule
from fused_sd.terms.support import Support

TEACHERS = ("server", "live", "ema", "synced", "reference")


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
        check_read(self)
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
