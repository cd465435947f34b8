"""A step of SRT in two processes, whose traces differ in length, is the step in one."""

import os
import pathlib

os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"

import torch
from ranks import free_port, spawn
from test_srt import assert_one_step, train_once


def train(rank, port, folder):
    """One of the processes; the first saves the weights and what was logged."""
    os.environ.update(MASTER_ADDR="localhost", MASTER_PORT=str(port), WORLD_SIZE="2")
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), ACCELERATE_USE_CPU="true")
    weights, logged = train_once(pathlib.Path(folder), batch=1, accumulate=2)
    if rank == 0:
        weights = {name.removeprefix("module."): value.data for name, value in weights.items()}
        torch.save((weights, logged), f"{folder}/step.pt")


def test_a_step_is_the_same_in_two_processes(tmp_path):
    spawn(train, free_port(), str(tmp_path))
    assert_one_step(*torch.load(tmp_path / "step.pt"))
