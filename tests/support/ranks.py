"""A few processes that talk over gloo, each of which hands a result back."""

import os
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

Work = Callable[..., Any]  # of a rank and what more is given; returns what torch.save can keep


def run(work: Work, num_ranks: int, folder: Path, *given: Any) -> list[Any]:
    """What each of the ranks returns; the work is a function of a module, which is imported."""
    torch.multiprocessing.spawn(_rank, (work, num_ranks, str(folder), given), nprocs=num_ranks)
    return [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in range(num_ranks)]


def _rank(rank: int, work: Work, num_ranks: int, folder: str, given: tuple[Any, ...]) -> None:
    torch.set_num_threads(int(os.environ.get("FUSED_SD_TEST_THREADS", "1")))
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(num_ranks))
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=num_ranks,
        timeout=timedelta(seconds=120),  # an error instead of a hang
    )
    torch.save(work(rank, *given), f"{folder}/rank{rank}.pt")
    dist.barrier()  # nobody leaves while others talk
    dist.destroy_process_group()
