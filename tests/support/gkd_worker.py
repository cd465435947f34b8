"""One of two processes that train TRL's trainers with a teacher model, and ours, for a step."""

import os
import pathlib
import traceback
from typing import Any
from unittest import mock

import torch
from accelerate.state import AcceleratorState
from gkd_pairs import build, make
from trl.experimental.gkd import GKDTrainer
from trl_worker import shard_on_cpu, whole

from fused_sd.integrations.trl import FusedGKDTrainer

STEP = {"optim": "sgd", "learning_rate": 1.0, "max_grad_norm": 0.0, "max_steps": 1, "lmbda": 0.0}
RUNS: dict[str, dict[str, Any]] = {
    "replicated": {},
    "replicated, accumulated": {"gradient_accumulation_steps": 2},
    "replicated, LoRA": {
        "adapter": {"target_modules": ["q_proj", "v_proj"], "init_lora_weights": False}
    },
    "sharded": {"sharded": True},
}


def train(cls: Any, folder: pathlib.Path, *, sharded: bool = False, **settings: Any) -> Any:
    """Train one step, and return the weights and what was logged."""
    AcceleratorState._reset_state()
    prepare = AcceleratorState.__init__

    def sharding(self: AcceleratorState, *args: Any, **kwargs: Any) -> None:
        prepare(self, *args, **kwargs)
        if sharded:
            shard_on_cpu(self, 2)

    with mock.patch.object(AcceleratorState, "__init__", sharding):
        trainer = make(
            cls,
            folder,
            student=build(0, dtype=torch.float64),
            teacher=build(7, dtype=torch.float64, hidden_size=48),
            **{**STEP, **settings},
        )
    trainer.train()
    logged = trainer.state.log_history[0]
    return {
        "weights": {name: whole(p) for name, p in trainer.model.named_parameters()},
        "logged": {name: logged[name] for name in ("loss", "grad_norm")},
    }


def main(rank: int, port: int, folder: str) -> None:
    """Train each run with both trainers, and save what is left of it or the error."""
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), WORLD_SIZE="2")
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), ACCELERATE_USE_CPU="true")
    for number, settings in enumerate(RUNS.values()):
        for cls in (GKDTrainer, FusedGKDTrainer):
            try:
                found = train(cls, pathlib.Path(folder), **settings)
            except Exception:
                found = {"error": traceback.format_exc()}
            torch.save(found, f"{folder}/{number}-{cls.__name__}-{rank}.pt")
