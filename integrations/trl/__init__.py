"""Self-distillation trainers on TRL: the same trainers without logits, and the methods it lacks."""

from fused_sd.integrations.trl.drop_in import (
    FusedSDFTTrainer,
    FusedSDPOTrainer,
    FusedSelfDistillationMixin,
)

__all__ = ["FusedSDFTTrainer", "FusedSDPOTrainer", "FusedSelfDistillationMixin"]
