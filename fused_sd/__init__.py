"""Fused self-distillation losses for LLM post-training, from hidden states, without the logits."""

__version__ = "0.1.0"

from fused_sd.combinations import METRIC_NEEDS
from fused_sd.distill import divergence_loss, topk_divergence_loss
from fused_sd.divergence import Jsd, MixedKl, generalized_jsd
from fused_sd.heads import LMHead
from fused_sd.loss_output import LossOutput
from fused_sd.support import (
    FULL_VOCABULARY,
    StudentTopK,
    TeacherTopK,
    TokenIds,
    UnionTopK,
)
from fused_sd.tokens import (
    EntryLogProbs,
    TokenLogProbs,
    cross_entropy_loss,
    entry_log_probs,
    policy_loss,
    token_log_probs,
)
from fused_sd.weighting import (
    Evidence,
    EvidenceSchedule,
    ImportanceCap,
    aggregation_weights,
    iw_opd_advantages,
    rlcsd_advantages,
)

METRICS = tuple(METRIC_NEEDS)
