"""A few processes that talk over gloo, and what each of them leaves."""

import contextlib
import os
import socket
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

Work = Callable[..., Any]  # of a rank and what more is given; a function of a module


def free_port() -> int:
    """A port that nobody listens at."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def spawn(work: Work, *given: Any, num_ranks: int = 2) -> None:
    """Do the work in every rank's process; an error of one ends the others."""
    torch.multiprocessing.spawn(_work_and_leave, (work, given), nprocs=num_ranks)


def _work_and_leave(rank: int, work: Work, given: tuple[Any, ...]) -> None:
    """Work, and end when the others have done so, too.

    Who leaves early breaks the others' collectives.  And gloo's threads may let go of their last
    tensors while the interpreter shuts down, which aborts the process: it ends without.
    """
    work(rank, *given)
    if dist.is_initialized():
        with contextlib.suppress(RuntimeError):  # some rank has gone or is stuck
            dist.monitored_barrier(timeout=timedelta(seconds=60))
    os._exit(0)


def run(work: Work, num_ranks: int, folder: Path, *given: Any) -> list[Any]:
    """What each of the ranks returns, which ``torch.save`` must be able to keep."""
    spawn(_rank, work, num_ranks, str(folder), given, num_ranks=num_ranks)
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


def remains_of(work: Work, folder: Path, names: Sequence[str]) -> dict[str, list[Any]]:
    """What each of two processes had at the end of each run, by the run's name.

    ``work(rank, port, folder, names)`` saves it as ``{number}-{rank}.pt``.
    """
    spawn(work, free_port(), str(folder), names)
    return {
        name: [torch.load(folder / f"{n}-{rank}.pt", weights_only=False) for rank in range(2)]
        for n, name in enumerate(names)
    }
