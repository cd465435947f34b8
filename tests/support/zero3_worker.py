"""One of two processes whose trainers run under DeepSpeed's ZeRO-3.

The same ``Run`` without DeepSpeed, in one process, is to leave the same weights and teachers.
"""

import dataclasses
import os
import pathlib
import sys
import traceback
from typing import Any

import torch
from accelerate.state import PartialState
from accelerate.utils import DistributedType
from trl_worker import EMA, SYNCED, Run, train

DEEPSPEED = {
    "zero_optimization": {
        "stage": 3,
        "stage3_param_persistence_threshold": 40,  # norms' weights stay whole on every rank
    },
    "zero_allow_untested_optimizer": True,
    "zero_force_ds_cpu_optimizer": False,
    "gradient_clipping": "auto",
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
}
TRUST = {"teacher_model_kind": "trust_region", "teacher_update_rate": 0.3}
KINDS = {"ema": EMA, "synced": SYNCED, "base": {"teacher_model_kind": "base"}, "trust": TRUST}


def run(settings: dict[str, Any], steps: int = 2, **changes: Any) -> Run:
    return Run("SDPO", settings=settings, steps=steps, dtype=torch.float32, **changes)


RUNS = {
    **{f"{kind}, path": run(settings, from_path=True) for kind, settings in KINDS.items()},
    **{f"{kind}, memory": run(settings) for kind, settings in KINDS.items()},
    "ema, path, LoRA": run(EMA, from_path=True, adapter=True),
    "ema, memory, LoRA": run(EMA, adapter=True),
    "synced, path, LoRA": run(SYNCED, from_path=True, adapter=True),
    "base, memory, LoRA": run(KINDS["base"], adapter=True),
    "trust, path, LoRA": run(TRUST, from_path=True, adapter=True),
    "ema, path, resumed": run(EMA, from_path=True, resumed=True),
    "ema, memory, LoRA, resumed": run(EMA, adapter=True, resumed=True),
    "ema, path, gradient broken": run(EMA, 1, from_path=True, broken=1),
}


def main(rank: int, port: int, folder: str, names: tuple[str, ...]) -> None:
    """Train each run, and save what is left of it or the error."""
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), WORLD_SIZE="2")
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank))
    os.environ.update(DS_ACCELERATOR="cpu", CUDA_VISIBLE_DEVICES="")
    import deepspeed  # noqa: F401  loads the module that is patched next

    # a kernel for shared memory, which it would compile here
    sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None
    # accelerate takes DeepSpeed for accelerators alone
    PartialState._prepare_backend = lambda *_, **__: ("gloo", DistributedType.MULTI_CPU)
    for number, name in enumerate(names):
        found = RUNS[name]
        settings = {**found.settings, "deepspeed": DEEPSPEED, "use_cpu": False}
        place = pathlib.Path(folder, f"run{number}")
        try:
            left = train(dataclasses.replace(found, settings=settings), place, 2)
        except Exception:
            left = {"error": traceback.format_exc()}
        torch.save(left, f"{folder}/{number}-{rank}.pt")
