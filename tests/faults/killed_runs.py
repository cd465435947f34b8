"""Training runs in processes of their own, where something goes wrong, and what they leave.

A server process imports TRL once and forks each run, so that a run costs a second or two.
"""

import contextlib
import functools
import multiprocessing
import os
import resource
import signal
import sys
import traceback
from datetime import timedelta
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist
import transformers
from method_pairs import make, model, rewards
from transformers import TrainerCallback
from transformers.trainer_callback import TrainerState

OF_RANKS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
SAVED, STEPS = 2, 6  # steps between checkpoints, and of a whole run
RUNS = {
    "SDPO, EMA": ("SDPO", {"teacher_model_kind": "ema", "teacher_update_rate": 0.3}),
    "SDZero, synced": ("SDZero", {"teacher_model_kind": "synced", "teacher_sync_steps": 3}),
    "RLSD, synced": ("RLSD", {"teacher_model_kind": "synced", "teacher_sync_steps": 1}),
    "RFT": ("RFT", {}),
}


def kill():
    os.kill(os.getpid(), signal.SIGKILL)


def stop():
    os.kill(os.getpid(), signal.SIGSTOP)


class AtStep(TrainerCallback):
    """Calls a function once a step has its gradients, before they change a weight."""

    def __init__(self, step, function):
        self.step, self.function = step, function

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if state.global_step + 1 == self.step:
            self.function()


def cut_and_kill(path):
    """Leave the first half of a file, as if killed while it was written."""
    os.truncate(path, os.path.getsize(path) // 2)
    kill()


def cut_in_torch_save(name):
    whole = torch.save

    def save(held, path, *args, **kwargs):
        whole(held, path, *args, **kwargs)
        if str(path).endswith(f"checkpoint-{2 * SAVED}/{name}"):
            cut_and_kill(path)

    return mock.patch("torch.save", save)


def cut_in_method(owner, method, name):
    """Cut the file that a method writes into the second checkpoint."""
    whole = getattr(owner, method)

    def save(self, path, *args, **kwargs):
        whole(self, path, *args, **kwargs)
        if f"checkpoint-{2 * SAVED}" in str(path):
            cut_and_kill(Path(path, name) if Path(path).is_dir() else path)

    return mock.patch.object(owner, method, save)


def killed_in_rotation():
    """Once the first file of an old checkpoint is removed."""

    def remove(folder, *args, **kwargs):
        Path(folder, "model.safetensors").unlink()
        kill()

    return mock.patch("shutil.rmtree", remove)


class Judge:
    """The usual rewards, but for one call, which does something else."""

    def __init__(self, call, act):
        self.calls, self.call, self.act = 0, call, act
        self.__name__ = rewards.__name__  # under which rewards are logged

    def __call__(self, prompts, **given):
        self.calls += 1
        return self.act(prompts) if self.calls == self.call else rewards(prompts)


def fail_once(prompts):
    raise ConnectionError("the verifier is away")


ACTS = {
    "killed": lambda prompts: kill(),
    "raises": fail_once,
    "too short": lambda prompts: [1.0] * (len(prompts) - 1),
    "infinite": lambda prompts: [float("inf")] * len(prompts),
}


def limit_files(num_bytes):
    """No file may be longer: a real limit of the system's, whose error is "File too large"."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, resource.RLIM_INFINITY))


# by name: what happens in the second step after a checkpoint, and what is patched in all steps
FAULTS = {
    "killed in a step": (kill, contextlib.nullcontext),
    "stopped in a step": (stop, contextlib.nullcontext),
    "killed in the teacher's file": (None, lambda: cut_in_torch_save("teacher.pt")),
    "killed in the weights": (
        None,
        lambda: cut_in_method(transformers.PreTrainedModel, "save_pretrained", "model.safetensors"),
    ),
    "killed in the optimizer's file": (None, lambda: cut_in_torch_save("optimizer.pt")),
    "killed in the trainer's state": (
        None,
        lambda: cut_in_method(TrainerState, "save_to_json", "trainer_state.json"),
    ),
    "killed in a rotation": (None, killed_in_rotation),
    "no room for the teacher": (lambda: limit_files(10_000), contextlib.nullcontext),
    "no room for the optimizer": (lambda: limit_files(200_000), contextlib.nullcontext),
}


def remains(trainer):
    """All that the next step would depend on, and what was logged."""
    times = ("time", "per_second", "runtime")
    logs = [
        {name: value for name, value in entry.items() if not any(t in name for t in times)}
        for entry in trainer.state.log_history
        if "loss" in entry
    ]
    teacher = trainer.teacher
    return {
        "weights": trainer.model.state_dict(),
        "teacher": None if teacher is None else teacher.state_dict(),
        "optimizer": trainer.optimizer.state_dict(),
        "schedule": trainer.lr_scheduler.state_dict(),
        "random": torch.get_rng_state(),
        "step": trainer.state.global_step,
        "logs": logs,
    }


def run(folder, name, *, resume=None, fault=None, **settings):
    """Train in this process, and leave ``remains.pt``.

    Args:
        fault: a name of ``FAULTS``.
        settings: of the trainer.
    """
    torch.set_num_threads(1)
    torch.manual_seed(0)
    method, own = RUNS[name]
    folder = Path(folder)
    saved = {"save_strategy": "steps", "save_steps": SAVED, "max_steps": STEPS}
    callback, patch = FAULTS.get(fault, (None, contextlib.nullcontext))
    if fault in ACTS:
        settings["reward_funcs"] = Judge(SAVED + 2, ACTS[fault])
    settings = {**saved, **own, **settings}
    trainer = make(method, folder / "out", student=model(torch.float32), **settings)
    if callback is not None:
        trainer.callback_handler.callbacks.insert(0, AtStep(SAVED + 2, callback))
    with patch():
        trainer.train(resume_from_checkpoint=resume)
    torch.save(remains(trainer), folder / f"remains{rank()}.pt")


def run_rank(folder, number, port, timeout, name, *, fault=None, **more):
    """``run`` as one of two processes, of which the second has the fault.

    Args:
        timeout: seconds for a collective.  transformers passes ``ddp_timeout`` on to GPUs alone.
    """
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), WORLD_SIZE="2")
    os.environ.update(RANK=str(number), LOCAL_RANK=str(number), ACCELERATE_USE_CPU="true")
    begin = functools.partial(dist.init_process_group, timeout=timedelta(seconds=timeout))
    with mock.patch("torch.distributed.init_process_group", begin):
        run(folder, name, fault=fault if number else None, **more)


def rank():
    """The number of a process among several, as text."""
    return os.environ.get("RANK", "")


def _recorded(work, folder, *given, **named):
    """Work, and leave a file ``error`` where an error ends it."""
    try:
        work(folder, *given, **named)
    except BaseException:
        limit_files(resource.RLIM_INFINITY)
        Path(folder, f"error{rank()}").write_text(traceback.format_exc())
        raise


def start(work, folder, *given, **named):
    """Start ``work(folder, ...)`` in a process that the server forks."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["killed_runs"])
    process = context.Process(target=_recorded, args=(work, folder, *given), kwargs=named)
    # the server is started by the first process, and imports by this path alone; a process has the
    # number of a rank only where ``run_rank`` gives it one
    with mock.patch.dict(os.environ, PYTHONPATH=os.pathsep.join(sys.path)):
        for name in OF_RANKS:
            os.environ.pop(name, None)
        process.start()
    return process


def code_of(work, *given, **named):
    """The exit code of work in a process of its own: that of a killed one is negative."""
    process = start(work, *given, **named)
    process.join(300)
    assert process.exitcode is not None, "it hangs"
    return process.exitcode


def assert_same_bits(found, wanted, at=""):
    assert type(found) is type(wanted), at
    if isinstance(wanted, dict):
        assert found.keys() == wanted.keys(), at
        for name in wanted:
            assert_same_bits(found[name], wanted[name], f"{at}/{name}")
    elif isinstance(wanted, list | tuple):
        assert len(found) == len(wanted), at
        for n, pair in enumerate(zip(found, wanted, strict=True)):
            assert_same_bits(*pair, f"{at}/{n}")
    elif isinstance(wanted, torch.Tensor):
        assert torch.equal(found, wanted), at
    else:
        assert repr(found) == repr(wanted), at  # which has all digits, and NaN is like NaN
