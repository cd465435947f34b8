"""Implementations that the benchmark compares, this library first."""

from fused_sd.bench.providers.cce import CCE
from fused_sd.bench.providers.eager import COMPILED, EAGER, EAGER_FP32
from fused_sd.bench.providers.fla import FLA
from fused_sd.bench.providers.liger import (
    LIGER_CHUNKED_JSD,
    LIGER_CHUNKED_JSD_COMPILED,
    LIGER_CROSS_ENTROPY,
    LIGER_FUSED_JSD,
    LIGER_GRPO,
    LIGER_SCALED,
)
from fused_sd.bench.providers.orda import ORDA
from fused_sd.bench.providers.ours import FUSED_SD, SPARSE, TOLERANCES
from fused_sd.bench.providers.provider import Provider
from fused_sd.bench.providers.quack import QUACK
from fused_sd.bench.providers.trl import TRL_DIVERGENCE, TRL_LOG_PROBS, TRL_SDPO
from fused_sd.bench.providers.verl import VERL_TORCH, VERL_TRITON

PROVIDERS: tuple[Provider, ...] = (
    FUSED_SD,
    SPARSE,
    *TOLERANCES,
    EAGER,
    EAGER_FP32,
    COMPILED,
    TRL_DIVERGENCE,
    TRL_LOG_PROBS,
    TRL_SDPO,
    LIGER_FUSED_JSD,
    LIGER_CHUNKED_JSD,
    LIGER_CHUNKED_JSD_COMPILED,
    LIGER_CROSS_ENTROPY,
    LIGER_SCALED,
    LIGER_GRPO,
    FLA,
    VERL_TORCH,
    VERL_TRITON,
    CCE,
    QUACK,
    ORDA,
)

__all__ = ["PROVIDERS", "Provider"]
