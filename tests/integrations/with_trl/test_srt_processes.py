"""A step of SRT in two processes, whose traces differ in length, is the step in one."""

import os
import pathlib
import socket

os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"

import torch
from test_srt import assert_one_step, train_once


def train(rank, port, folder):
    """One of the processes; the first saves the weights and what was logged."""
    os.environ.update(MASTER_ADDR="localhost", MASTER_PORT=str(port), WORLD_SIZE="2")
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), ACCELERATE_USE_CPU="true")
    weights, logged = train_once(pathlib.Path(folder), batch=1, accumulate=2)
    if rank == 0:
        weights = {name.removeprefix("module."): value.data for name, value in weights.items()}
        torch.save((weights, logged), f"{folder}/step.pt")
    torch.distributed.destroy_process_group()


def test_a_step_is_the_same_in_two_processes(tmp_path):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(train, (port, str(tmp_path)), nprocs=2)
    assert_one_step(*torch.load(tmp_path / "step.pt"))
