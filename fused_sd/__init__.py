"""Fused self-distillation losses for LLM post-training, from hidden states, without the logits."""

from typing import Any

from fused_sd.engine.certificate import GradientCertificate
from fused_sd.engine.options import LossOptions, Options
from fused_sd.head.lm_head import LMHead
from fused_sd.losses.divergence import divergence_loss, topk_divergence_loss
from fused_sd.losses.gkd import gkd_loss
from fused_sd.losses.grpo import grpo_loss
from fused_sd.losses.log_probs import EntryLogProbs, TokenLogProbs, entry_log_probs, token_log_probs
from fused_sd.losses.modules import (
    CrossEntropyLoss,
    GKDLoss,
    GRPOLoss,
    OPSDLoss,
    RLCSDLoss,
    RLSDLoss,
    SDFTLoss,
    SDPOLoss,
    SDZeroLoss,
)
from fused_sd.losses.opsd import opsd_loss
from fused_sd.losses.output import LossOutput
from fused_sd.losses.policy import policy_loss, sampled_kl_loss
from fused_sd.losses.rlcsd import rlcsd_loss
from fused_sd.losses.rlsd import rlsd_loss
from fused_sd.losses.sd_zero import sd_zero_loss
from fused_sd.losses.sdft import sdft_loss
from fused_sd.losses.sdpo import sdpo_loss
from fused_sd.losses.token import cross_entropy_loss
from fused_sd.teaching.align import Alignment, align_responses, check_alignment
from fused_sd.teaching.shift import ShiftEvidence, detect_shift
from fused_sd.teaching.teacher import Teacher
from fused_sd.teaching.trust_region import trust_region_states
from fused_sd.terms.advantages import iw_opd_advantages, rlcsd_advantages
from fused_sd.terms.comparison import Comparison
from fused_sd.terms.divergence import Jsd, MixedKl, SkewKl
from fused_sd.terms.divergence_term import generalized_jsd
from fused_sd.terms.evidence import Evidence, EvidenceSchedule
from fused_sd.terms.metrics import METRIC_NEEDS
from fused_sd.terms.support import (
    FULL_VOCABULARY,
    StudentTopK,
    TeacherNucleus,
    TeacherTopK,
    TokenIds,
    UnionTopK,
)
from fused_sd.terms.weighting import ImportanceCap, aggregation_weights, skip_first_tokens

_TOOLS = ("Plan", "plan")  # loaded when they are asked for: `import fused_sd` loads no tool

METRICS = tuple(METRIC_NEEDS)  # what divergence_loss can return beside the loss

__version__ = "0.1.0"

__all__ = [
    "FULL_VOCABULARY",
    "METRICS",
    "Alignment",
    "Comparison",
    "CrossEntropyLoss",
    "EntryLogProbs",
    "Evidence",
    "EvidenceSchedule",
    "GKDLoss",
    "GRPOLoss",
    "GradientCertificate",
    "ImportanceCap",
    "Jsd",
    "LMHead",
    "LossOptions",
    "LossOutput",
    "MixedKl",
    "OPSDLoss",
    "Options",
    "Plan",
    "RLCSDLoss",
    "RLSDLoss",
    "SDFTLoss",
    "SDPOLoss",
    "SDZeroLoss",
    "ShiftEvidence",
    "SkewKl",
    "StudentTopK",
    "Teacher",
    "TeacherNucleus",
    "TeacherTopK",
    "TokenIds",
    "TokenLogProbs",
    "UnionTopK",
    "aggregation_weights",
    "align_responses",
    "check_alignment",
    "cross_entropy_loss",
    "detect_shift",
    "divergence_loss",
    "entry_log_probs",
    "generalized_jsd",
    "gkd_loss",
    "grpo_loss",
    "iw_opd_advantages",
    "opsd_loss",
    "plan",
    "policy_loss",
    "rlcsd_advantages",
    "rlcsd_loss",
    "rlsd_loss",
    "sampled_kl_loss",
    "sd_zero_loss",
    "sdft_loss",
    "sdpo_loss",
    "skip_first_tokens",
    "token_log_probs",
    "topk_divergence_loss",
    "trust_region_states",
]


def __getattr__(name: str) -> Any:
    if name in _TOOLS:
        from fused_sd import planning

        return getattr(planning, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*globals(), *_TOOLS]
