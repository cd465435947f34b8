"""Runs that end in the midst of something, and the runs that resume them.

They end as the unbroken one, bit by bit: weights, teacher, optimizer, schedule, random numbers and
all logged values, on one thread of one machine.  A checkpoint that was not written to its end is
never resumed from.
"""

import os
import re
import signal

import pytest
import torch

pytest.importorskip("trl")

import killed_runs
from killed_runs import ACTS, FAULTS, RUNS, STEPS, assert_same_bits, code_of
from method_pairs import make, model

from fused_sd.integrations.trl.checkpoints import last_whole

FULL = os.environ.get("FUSED_SD_TEST_FULL")
MAIN, *OTHERS = RUNS
SHORT = [
    (MAIN, "killed in a step"),
    (MAIN, "killed in the teacher's file"),
    (MAIN, "killed in the trainer's state"),
    (MAIN, "killed in a rotation"),
    (MAIN, "no room for the optimizer"),
    (MAIN, "raises"),
    (OTHERS[0], "killed in a step"),
]
ALONE = [fault for fault in (*FAULTS, *ACTS) if fault != "stopped in a step"]
CASES = [(name, fault) for name in RUNS for fault in ALONE] if FULL else SHORT
NO_ROOM = "OSError: the checkpoint .*checkpoint-4 could not be written: .*goes on from the last"
# how the error of a run that was not killed begins
ERRORS = {
    "no room for the teacher": NO_ROOM,
    "no room for the optimizer": NO_ROOM,
    "raises": "ConnectionError: the verifier is away",
    "too short": "ValueError: the reward function 'rewards' must return a list with one entry",
    "infinite": "ValueError: the reward function 'rewards' must return finite numbers",
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """What the unbroken run of a name leaves, made once."""
    known = {}

    def remains(name):
        if name not in known:
            folder = tmp_path_factory.mktemp("whole")
            assert code_of(killed_runs.run, folder, name) == 0
            known[name] = torch.load(folder / "remains.pt", weights_only=False)
        return known[name]

    return remains


@pytest.mark.parametrize("name, fault", CASES)
def test_a_run_that_is_resumed_ends_as_the_unbroken_one(name, fault, whole, tmp_path):
    if name == "RFT" and "teacher" in fault:
        pytest.skip("it has none")
    settings = {"save_total_limit": 1} if "rotation" in fault else {}
    code = code_of(killed_runs.run, tmp_path, name, fault=fault, **settings)
    assert code == (1 if fault in ERRORS else -signal.SIGKILL)
    if fault in ERRORS:
        assert re.search(ERRORS[fault], (tmp_path / "error").read_text())
    assert not (tmp_path / "remains.pt").exists()
    assert code_of(killed_runs.run, tmp_path, name, resume=True, **settings) == 0
    found = torch.load(tmp_path / "remains.pt", weights_only=False)
    assert found["step"] == STEPS
    assert_same_bits(found, whole(name))


def cut_checkpoints(folder, **written):
    """Checkpoints of which the trainer's state is whole, cut or missing."""
    for name, text in written.items():
        path = folder / name.replace("_", "-")
        path.mkdir(parents=True)
        if text is not None:
            (path / "trainer_state.json").write_text(text)


def test_a_checkpoint_that_is_not_whole_is_refused(tmp_path):
    trainer = make("RFT", tmp_path, student=model(torch.float32))
    with pytest.raises(ValueError, match=r"find a whole checkpoint in .*, got 0 checkpoints"):
        trainer.train(resume_from_checkpoint=True)
    cut_checkpoints(tmp_path, checkpoint_2=None, checkpoint_10='{"epoch": 1, "lo')
    with pytest.raises(ValueError, match="got 2 checkpoints, none of them written to its end"):
        trainer.train(resume_from_checkpoint=True)
    rule = "be a checkpoint that was written to its end, got .*checkpoint-10 without a readable"
    with pytest.raises(ValueError, match=rule):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-10"))


def test_cut_checkpoints_are_passed_over_with_a_warning(tmp_path):
    """By the number and not by the name: 10 comes after 2."""
    written = {"checkpoint_2": "{}", "checkpoint_10": "{}", "checkpoint_11": "", "checkpoint_9": ""}
    cut_checkpoints(tmp_path, **written)
    with pytest.warns(UserWarning, match=r"^checkpoint-11 in .* goes on from checkpoint-10$"):
        assert last_whole(str(tmp_path)) == str(tmp_path / "checkpoint-10")


@pytest.mark.parametrize("kind", ["ema", "synced"])
def test_a_checkpoint_without_a_teacher_says_where_the_teacher_starts(kind, tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 1, "teacher_model_kind": kind}
    settings["teacher_sync_steps"] = 9  # the teacher moves after the last step
    trainers = [make("SDPO", tmp_path, student=model(torch.float32), **settings) for _ in range(2)]
    trainers[0].train()
    (tmp_path / "checkpoint-2" / "teacher.pt").unlink()
    with pytest.warns(UserWarning, match="checkpoint-2 holds no teacher: the teacher starts as"):
        trainers[1].train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    with trainers[1].teacher.acting() as teacher:
        for found, wanted in zip(teacher.parameters(), trainers[0].model.parameters(), strict=True):
            assert torch.equal(found, wanted)
