"""Every implementation that the benchmark compares, this library first."""

from fused_sd.bench.providers.eager import COMPILED, EAGER, EAGER_FP32
from fused_sd.bench.providers.ours import FUSED_SD
from fused_sd.bench.providers.provider import Provider
from fused_sd.bench.providers.trl import TRL_DIVERGENCE, TRL_LOG_PROBS, TRL_SDPO

PROVIDERS: tuple[Provider, ...] = (
    FUSED_SD,
    EAGER,
    EAGER_FP32,
    COMPILED,
    TRL_DIVERGENCE,
    TRL_LOG_PROBS,
    TRL_SDPO,
)

__all__ = ["PROVIDERS", "Provider"]
