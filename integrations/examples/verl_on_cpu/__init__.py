"""verl on a machine without a GPU: a platform, and a rollout engine that runs transformers.

It is for finding faults in a recipe on a laptop, not for training.  ``verl_on_cpu.sh`` beside this
package has the variables and settings that it needs.  verl imports this package in every
process: in the driver, and in Ray's workers, which have the driver's environment.
"""

from typing import Any

from verl.utils import distributed
from verl.workers.rollout import base
from verl.workers.rollout.replica import RolloutReplica, RolloutReplicaRegistry

from fused_sd.integrations.examples.verl_on_cpu import platform  # noqa: F401  registers "cpu"

ROLLOUT = "transformers"
"""The value of ``actor_rollout_ref.rollout.name`` that chooses the engine of this package."""

_with_backend = distributed.initialize_global_process_group_ray


def _with_gloo(timeout_second: int | None = None, backend: str | None = None) -> Any:
    """Start a worker's process group, for which verl would name the CPU's backend twice."""
    return _with_backend(timeout_second, backend or "gloo")


distributed.initialize_global_process_group_ray = _with_gloo


def _replica() -> type[RolloutReplica]:
    from fused_sd.integrations.examples.verl_on_cpu.rollout import TransformersReplica

    return TransformersReplica


RolloutReplicaRegistry.register(ROLLOUT, _replica)
# this registry has no function to add to it
base._ROLLOUT_REGISTRY[ROLLOUT, "async"] = f"{__name__}.rollout.WeightSender"
