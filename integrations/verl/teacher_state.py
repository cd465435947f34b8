"""What verl's FSDP engine saves of a teacher: each rank's shards, in a file of its own."""

import os
from typing import Any

import torch.distributed as dist
from torch.distributed.tensor import DTensor

from fused_sd import Teacher
from fused_sd.teaching.parameters import local_shard


def teacher_file(folder: str) -> str:
    """Return this rank's file, named like verl's ``model_world_size_*_rank_*.pt``."""
    return os.path.join(
        folder, f"teacher_world_size_{dist.get_world_size()}_rank_{dist.get_rank()}.pt"
    )


def local_state(teacher: Teacher) -> dict[str, Any]:
    """Return a teacher's state with this rank's shards, in the host's memory.

    A pickled DTensor would carry its device mesh along.
    """
    state = teacher.state_dict()
    weights = {name: local_shard(value).cpu() for name, value in state["weights"].items()}
    return {**state, "weights": weights}


def sharded_state(state: dict[str, Any], teacher: Teacher) -> dict[str, Any]:
    """Turn a ``local_state``'s shards into DTensors placed like the teacher's weights."""
    own = teacher.state_dict()["weights"]
    weights = {}
    for name, value in state["weights"].items():
        like = own.get(name)
        if isinstance(like, DTensor):
            value = DTensor.from_local(
                value.to(like.device),
                like.device_mesh,
                like.placements,
                run_check=False,
                shape=like.shape,
                stride=like.stride(),
            )
        weights[name] = value
    return {**state, "weights": weights}
