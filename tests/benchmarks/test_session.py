"""A session on a GPU machine: its commands exist, steps end in time, failures are told."""

import importlib.util
import tarfile
import time

import pytest

from benchmarks.session import __main__ as command
from benchmarks.session.steps import Session, Step


@pytest.fixture
def session(tmp_path):
    return Session(tmp_path, {}, 30.0)


def say(text, status=0):
    return lambda seconds: ["-c", f"print('{text}'); raise SystemExit({status})"]


@pytest.mark.parametrize("dry", [False, True])
def test_every_module_that_is_run_exists(dry, session, tmp_path):
    seen = []

    def record(*lanes):
        seen.extend(step.command(100.0) for lane in lanes for step in lane)

    session.run = record
    command.first_stage(session, tmp_path, dry)
    assert len(seen) == 8
    command.second_stage(session, tmp_path, dry, "abc")
    assert len(seen) == 11
    for option, module, *_ in seen:
        assert option == "-m"
        assert importlib.util.find_spec(module) is not None, module
    assert sum("--commit" in arguments for arguments in seen) == 3
    assert all("--resume" in arguments for arguments in seen[8:])


def test_lanes_run_side_by_side_and_steps_one_after_another(session, tmp_path):
    one = [Step(say("first"), 20, "one.txt"), Step(say("second", 3), 20, "one.txt", (0, 3))]
    session.run(one, [Step(say("beside", 1), 20, "two.txt")])
    text = (tmp_path / "one.txt").read_text()
    assert text.index("first\nexit status 0") < text.index("second\nexit status 3")
    assert "beside\nexit status 1" in (tmp_path / "two.txt").read_text()
    assert len(session.failed) == 1
    assert session.failed[0].startswith("1: -c")


def test_a_step_is_ended_in_time_with_what_it_wrote(session, tmp_path):
    script = "import time; print('begun', flush=True); time.sleep(60)"
    started = time.monotonic()
    session.run([Step(lambda seconds: ["-c", script], 2.0, "log.txt")])
    assert time.monotonic() - started < 30
    assert "begun\nexit status killed after 2 s" in (tmp_path / "log.txt").read_text()
    assert len(session.failed) == 1


def test_a_step_that_is_continued_is_run_again(session, tmp_path):
    script = (
        "import pathlib, sys\n"
        f"mark = pathlib.Path({str(tmp_path / 'mark')!r})\n"
        "sys.exit(0 if mark.exists() else mark.touch() or 1)\n"
    )
    session.run([Step(lambda seconds: ["-c", script], 20, "log.txt", continued=True)])
    assert session.failed == []
    assert "exit status 1" in (tmp_path / "log.txt").read_text()
    session.seconds = 0.0
    session.run([Step(say("late"), 20, "late.txt")])
    assert not (tmp_path / "late.txt").exists()


def test_what_was_carried_is_unpacked(tmp_path, monkeypatch):
    monkeypatch.setattr(command, "PLACE", tmp_path / "place")
    (tmp_path / "kernel.cubin").write_text("code")
    with tarfile.open(tmp_path / "cache.txz", "w:xz") as archive:
        archive.add(tmp_path / "kernel.cubin", "KEY/kernel.cubin")
    found = command.prepared(None, tmp_path / "cache.txz", dry=False)
    assert found["TRITON_CACHE_DIR"] == str(tmp_path / "place" / "triton")
    assert (tmp_path / "place" / "triton" / "KEY" / "kernel.cubin").exists()
    assert str(tmp_path / "place" / "site") in found["PYTHONPATH"]
    folder = command.prepared(None, tmp_path, dry=True)
    assert folder["TRITON_CACHE_DIR"] == str(tmp_path)
    with pytest.raises(SystemExit, match="2"):
        command.main(["1", "--out", str(tmp_path), "--wheels", str(tmp_path / "absent")])
