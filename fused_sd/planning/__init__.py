"""What a run will cost, beforehand: memory, chunk and time, of this library and of others."""

from fused_sd.planning.plan import plan
from fused_sd.planning.result import Estimate, Plan

__all__ = ["Estimate", "Plan", "plan"]
