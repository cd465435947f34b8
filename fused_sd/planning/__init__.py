"""Plans: memory, chunk size and time of a loss, without running it."""

from fused_sd.planning.plan import plan
from fused_sd.planning.result import Estimate, Plan

__all__ = ["Estimate", "Plan", "plan"]
