"""Trainers on TRL: its self-distillation trainers without logits, and methods that it lacks."""

from fused_sd.checks.extras import require

require("trl", "trl", "peft", "datasets")

from fused_sd.integrations.trl.collect import collect_traces
from fused_sd.integrations.trl.credit_maps import CreditMapCallback
from fused_sd.integrations.trl.discovery import (
    DiscoveryConfig,
    DiscoveryTrainer,
    discovery_probability,
)
from fused_sd.integrations.trl.drop_in import (
    FusedSDFTTrainer,
    FusedSDPOTrainer,
    FusedSelfDistillationMixin,
)
from fused_sd.integrations.trl.fused_distillation import FusedDistillationTrainer
from fused_sd.integrations.trl.fused_gkd import FusedGKDTrainer
from fused_sd.integrations.trl.fused_grpo import FusedGRPOTrainer
from fused_sd.integrations.trl.generators import transformers_generate, vllm_generate
from fused_sd.integrations.trl.grpo import GRPOConfig, GRPOTrainer
from fused_sd.integrations.trl.iw_opd import IWOPDConfig, IWOPDTrainer
from fused_sd.integrations.trl.opsd import OPSDConfig, OPSDTrainer
from fused_sd.integrations.trl.revise import TraceConfig
from fused_sd.integrations.trl.rft import RFTConfig, RFTTrainer
from fused_sd.integrations.trl.rlcsd import RLCSDConfig, RLCSDTrainer
from fused_sd.integrations.trl.rlsd import RLSDConfig, RLSDTrainer
from fused_sd.integrations.trl.sd_zero import SDZeroConfig, SDZeroTrainer
from fused_sd.integrations.trl.sdft import SDFTConfig, SDFTTrainer
from fused_sd.integrations.trl.sdpg import SDPGConfig, SDPGTrainer
from fused_sd.integrations.trl.sdpo import SDPOConfig, SDPOTrainer
from fused_sd.integrations.trl.srt import SRTConfig, SRTTrainer
from fused_sd.integrations.trl.srt_data import sft_dataset
from fused_sd.integrations.trl.srt_stages import sequential_srt, split_traces
from fused_sd.integrations.trl.traces import Trace, load_traces
from fused_sd.integrations.trl.trainer import SelfDistillationTrainer

__all__ = [
    "CreditMapCallback",
    "DiscoveryConfig",
    "DiscoveryTrainer",
    "FusedDistillationTrainer",
    "FusedGKDTrainer",
    "FusedGRPOTrainer",
    "FusedSDFTTrainer",
    "FusedSDPOTrainer",
    "FusedSelfDistillationMixin",
    "GRPOConfig",
    "GRPOTrainer",
    "IWOPDConfig",
    "IWOPDTrainer",
    "OPSDConfig",
    "OPSDTrainer",
    "RFTConfig",
    "RFTTrainer",
    "RLCSDConfig",
    "RLCSDTrainer",
    "RLSDConfig",
    "RLSDTrainer",
    "SDFTConfig",
    "SDFTTrainer",
    "SDPGConfig",
    "SDPGTrainer",
    "SDPOConfig",
    "SDPOTrainer",
    "SDZeroConfig",
    "SDZeroTrainer",
    "SRTConfig",
    "SRTTrainer",
    "SelfDistillationTrainer",
    "Trace",
    "TraceConfig",
    "collect_traces",
    "discovery_probability",
    "load_traces",
    "sequential_srt",
    "sft_dataset",
    "split_traces",
    "transformers_generate",
    "vllm_generate",
]
