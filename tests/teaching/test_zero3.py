"""Teachers of models that DeepSpeed's ZeRO-3 shards, in two processes, against whole ones."""

import importlib.util
import os
import sys

import pytest
import torch
from ranks import free_port, spawn
from torch import nn

from fused_sd import Teacher

RATE = 0.01
CONFIG = {
    "train_micro_batch_size_per_gpu": 1,
    # biases stay whole on every rank
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 6},
    "bf16": {"enabled": True},
}


def make():
    """Of odd sizes, so that the last rank's pieces are padded."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Linear(5, 3)).bfloat16()


def step(parameter, at):
    parameter.add_((at + 1) / 16)


def assert_teaches_alike(teacher, reference):
    states = torch.ones(2, 3, dtype=torch.bfloat16)
    with teacher.acting() as module, reference.acting() as other:
        assert torch.equal(module(states), other(states))
    expected = reference.state_dict()["weights"]
    for name, weight in teacher.whole_weights():
        assert weight.dtype == expected[name].dtype, name
        torch.testing.assert_close(weight, expected[name], rtol=0, atol=1e-6, msg=name)


def zero3_teacher(rank, folder, port):
    """Follow a student that was sharded when the teacher was made, and one that was not."""
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2")
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    os.environ.update(DS_ACCELERATOR="cpu", CUDA_VISIBLE_DEVICES="")
    import deepspeed

    # a kernel for shared memory, which it would compile here
    sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None
    deepspeed.init_distributed("gloo")
    whole, sharded, late = make(), make(), make()
    settings = {"kind": "ema", "rate": RATE}
    teachers = [Teacher(late, **settings)]
    deepspeed.zero.Init(module=sharded, config_dict_or_path=CONFIG, dtype=torch.bfloat16)
    assert all(parameter.numel() == 0 for parameter in sharded.parameters())
    teachers.append(Teacher(sharded, **settings))
    with pytest.raises(ValueError, match=r"shapes and shards.*\(8,\) and \(5, 3\); shard both"):
        Teacher(sharded, weights=make())
    # engines that are deleted take their hooks along
    engines = [
        deepspeed.initialize(model=model, config=CONFIG)[0]
        for model in (late, sharded, *(teacher.module for teacher in teachers))
    ]
    with pytest.raises(ValueError, match="got DeepSpeed modules; copy it before sharding"):
        Teacher(engines[0])
    reference = Teacher(whole, **settings)
    for number in range(12):
        with torch.no_grad():
            for at, parameter in enumerate(whole.parameters()):
                step(parameter, at + number)
            for model in (late, sharded):
                for at, parameter in enumerate(model.parameters()):
                    with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
                        step(parameter, at + number)
        for teacher in (reference, *teachers):
            assert teacher.update()
        for teacher in teachers:
            assert_teaches_alike(teacher, reference)
    saved = {**teachers[0].state_dict(), "weights": dict(teachers[0].whole_weights())}
    pieces = teachers[1].state_dict()
    pieces["weights"] = {name: piece.clone() for name, piece in pieces["weights"].items()}
    for teacher in teachers:
        teacher.sync()
    for teacher, state in ((teachers[1], saved), (teachers[0], pieces)):
        teacher.load_state_dict(state)
        assert_teaches_alike(teacher, reference)
    with open(f"{folder}/{rank}", "w") as file:
        file.write("passed")


# a look at the package: importing it warns, and would start its logging here
@pytest.mark.skipif(not importlib.util.find_spec("deepspeed"), reason="deepspeed is not installed")
def test_zero3s_pieces_are_averaged_saved_and_loaded_as_whole_weights_are(tmp_path):
    spawn(zero3_teacher, str(tmp_path), free_port())
    assert {path.read_text() for path in tmp_path.iterdir()} == {"passed"}
    assert len(list(tmp_path.iterdir())) == 2
