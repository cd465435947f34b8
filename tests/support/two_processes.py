"""Two processes that each do a list of runs, and what is left of them."""

import socket
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

Work = Callable[[int, int, str, tuple[str, ...]], None]


def free_port() -> int:
    """A port that nobody listens at."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def remains_of(work: Work, folder: Path, names: Sequence[str]) -> dict[str, list[Any]]:
    """What each of two processes had at the end of each run, by the run's name.

    ``work(rank, port, folder, names)`` saves it as ``{number}-{rank}.pt``.
    """
    torch.multiprocessing.spawn(work, (free_port(), str(folder), names), nprocs=2)
    return {
        name: [torch.load(folder / f"{n}-{rank}.pt", weights_only=False) for rank in range(2)]
        for n, name in enumerate(names)
    }
