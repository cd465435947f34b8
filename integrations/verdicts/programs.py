"""Runs a Python program that a model wrote, in a process with limits.

What holds it:

* limits on CPU and wall time, memory, and the size of files and output; for users other than root
  also on further processes
* ``python -I -S`` with an empty environment: only the standard library can be imported
* an empty working directory, deleted afterwards
* on Linux with Landlock and seccomp, the kernel: no other process, program, signal to others or
  socket; files are read in the working directory, Python's library and the system's shared
  libraries alone, and written in the working directory alone (``sealing`` has the whole list, and
  ``python -m fused_sd.integrations.verdicts.sealing`` says what a machine's kernel holds)
* everywhere an audit hook, which refuses the same with a message that the model can read
* on Linux, where users may make namespaces, a network namespace without a network
* the end of the process's whole group once the program has ended or its time is over

What they do not hold:

* The hook lives in the process that it watches, and code that sets out to get around it can.  Where
  the kernel is not asked, nothing else stops such code.
* Statements that test a program run in its process.  A program can read them there, define objects
  that equal everything, or report a success of its own.  A test by input and output has what it
  expects in the trainer's process, where no program reaches it.
* Size and modification times of files outside can be read, and where the hook is got around, modes
  and times of the user's own files be changed.
* The number of files in the working directory has no limit but time.

So train in a container that holds nothing that a program may not read or break.

macOS has no working limit on memory and no namespaces; there only time bounds the memory.
"""

import functools
import json
import os
import secrets
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from fused_sd.checks import check_positive, fail
from fused_sd.integrations.verdicts.folder import temporary_folder

SCRIPT = str(Path(__file__).with_name("confined.py"))
OPTIONS = ("-I", "-S", "-B", "-X", "utf8")
OPEN_FILES = 32
MIB, KIB = 2**20, 2**10

Status = Literal["finished", "raised", "exited", "killed", "time", "memory", "output"]


@dataclass(frozen=True)
class Limits:
    """What one run of a program may use.

    Attributes:
        cpu_seconds: processor time, in whole seconds.
        wall_seconds: time on the clock; more than ``cpu_seconds``, since others compute too.
        memory_mib: address space.
        output_kib: what it prints, and the size of each file that it writes.

    Examples:
        >>> from fused_sd.integrations.verdicts import CodeVerifier, Limits
        >>> judge = CodeVerifier(limits=Limits(cpu_seconds=1, wall_seconds=3.0))
        >>> judge.limits.memory_mib
        512
    """

    cpu_seconds: int = 4
    wall_seconds: float = 12.0
    memory_mib: int = 512
    output_kib: int = 256

    def __post_init__(self) -> None:
        for name in ("cpu_seconds", "wall_seconds", "memory_mib", "output_kib"):
            check_positive(name, getattr(self, name), "pass a larger number")
        for name in ("cpu_seconds", "memory_mib", "output_kib"):
            if not isinstance(getattr(self, name), int):
                fail(name, "be a whole number", repr(getattr(self, name)), "round it up")

    def resources(self) -> dict[str, int]:
        """Return the resource limits by name."""
        return {
            "RLIMIT_CPU": self.cpu_seconds,
            "RLIMIT_AS": self.memory_mib * MIB,
            "RLIMIT_FSIZE": self.output_kib * KIB,
            "RLIMIT_NOFILE": OPEN_FILES,
            "RLIMIT_NPROC": 0,
            "RLIMIT_CORE": 0,
        }


@dataclass(frozen=True)
class Outcome:
    """How a run ended.

    Attributes:
        status: "finished" where the program, and the snippet behind it, ran to its end; "raised" an
            exception; "exited" before the end or with an error; "killed" by a signal; or which
            limit it exceeded.
        stdout: what it printed.
        message: the traceback, or how it exited.
    """

    status: Status
    stdout: str
    message: str = ""


def run_program(
    program: str, *, stdin: str = "", snippet: str | None = None, limits: Limits | None = None
) -> Outcome:
    """Run a program.

    Args:
        program: the source text.
        stdin: what it reads from standard input.
        snippet: statements to execute behind the program in the same namespace; the program is then
            imported as a module (``__name__`` is not ``"__main__"``).
        limits: the defaults of ``Limits`` where None.

    Raises:
        ValueError: the platform has no POSIX processes.
    """
    if os.name != "posix":
        fail("platform", "be Linux or macOS, to run programs under limits", sys.platform, "use one")
    limits = limits or Limits()
    job = {"program": program, "snippet": snippet, "limits": limits.resources()}
    token = secrets.token_hex(16)  # that a report is the script's and no print of the program's
    with (
        temporary_folder() as folder,
        tempfile.TemporaryFile() as exchange,
        tempfile.TemporaryFile() as given,
        tempfile.TemporaryFile() as printed,
    ):
        exchange.write(json.dumps({**job, "token": token}).encode())
        given.write(stdin.encode(errors="surrogatepass"))
        exchange.seek(0)
        given.seek(0)
        code = _run(folder, (given, printed, exchange), limits.wall_seconds)
        report = _read_report(exchange, token)
        printed.seek(0)
        output = printed.read(limits.output_kib * KIB)
    text = output.decode(errors="replace")
    if code is None or code == -signal.SIGXCPU:
        return Outcome("time", text)
    if len(output) == limits.output_kib * KIB:
        return Outcome("output", text)
    return _outcome(code, report, text, must_report=snippet is not None)


def _run(folder: str, files: tuple[Any, Any, Any], wall_seconds: float) -> int | None:
    """Run the script to its end and kill what is left of its group; return its exit code.

    Args:
        files: standard input, output, and the file of the job.

    Returns:
        None where it was killed because its time was over.
    """
    stdin, stdout, exchange = files
    deadline = time.monotonic() + wall_seconds
    alive, held = os.pipe()  # closed when the process ends: to wait for without polling
    try:
        process = subprocess.Popen(
            [*_without_network(), sys.executable, *OPTIONS, SCRIPT, str(exchange.fileno())],
            stdin=stdin,
            stdout=stdout,
            stderr=subprocess.DEVNULL,  # tracebacks come with the report
            cwd=folder,
            env={},
            pass_fds=(exchange.fileno(), held),
            start_new_session=True,
        )
        os.close(held)
        held = -1
        try:
            poll = select.poll()
            poll.register(alive, select.POLLIN | select.POLLHUP)
            poll.poll(1000 * wall_seconds)
            process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            return None
        finally:
            _kill_group(process.pid)
            process.wait()
        return process.returncode
    finally:
        os.close(alive)
        if held >= 0:
            os.close(held)


def _kill_group(group: int) -> None:
    try:
        os.killpg(group, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):  # macOS: no permission for one that has ended
        return


def _read_report(exchange: Any, token: str) -> dict[str, str]:
    """Return the script's report, empty where it wrote none or the program wrote over it."""
    exchange.seek(0)
    try:
        report = json.loads(exchange.read())
    except (ValueError, RecursionError):  # the program can write what it likes
        return {}
    if not isinstance(report, dict) or report.get("token") != token:
        return {}
    status, message = str(report.get("status")), report.get("message", "")
    if status not in get_args(Status) or not isinstance(message, str):
        return {}
    return {"status": status, "message": message} if message else {"status": status}


def _outcome(code: int, report: dict[str, Any], text: str, *, must_report: bool) -> Outcome:
    if code < 0:
        named = -code in {known.value for known in signal.Signals}  # real-time signals have none
        what = signal.Signals(-code).name if named else f"signal {-code}"
        return Outcome("killed", text, f"killed by {what}")
    status = report.get("status", "exited" if must_report or code else "finished")
    if status == "finished" and code and not must_report:
        status = "exited"
    return Outcome(status, text, report.get("message", f"exit status {code}"))


@functools.cache
def _without_network() -> tuple[str, ...]:
    """Return the words that put a command into a network namespace, none where that is refused."""
    prefix = ("unshare", "--user", "--map-current-user", "--net", "--")
    found = shutil.which(prefix[0])
    if found is None:
        return ()
    prefix = (found, *prefix[1:])
    tried = subprocess.run([*prefix, sys.executable, "-I", "-S", "-c", ""], capture_output=True)
    return prefix if tried.returncode == 0 else ()
