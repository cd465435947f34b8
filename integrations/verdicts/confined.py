"""Runs one program under limits; a script of its own, which ``programs`` starts for each test.

It imports the standard library alone.  Its argument is the descriptor of a file that holds the job
and then takes the report of what became of the program.
"""

import _thread
import builtins
import importlib.util
import json
import linecache
import os
import resource
import sys
import traceback
from collections.abc import Callable
from typing import Any

SOURCE = "solution.py"
TESTS = "test.py"
# Functions that reach out of the process.  The events are Python's own: docs.python.org, "Audit
# events table".
REFUSED = (
    "socket.",
    "subprocess.",
    "os.",  # what stays allowed is listed below
    "ctypes.",
    "pty.",
    "fcntl.",
    "signal.",
    "syslog.",
    "resource.",
    "sqlite3.connect",
    "_thread.",
    "sys.remote_exec",
    "gc.",  # finds every object of the process
    "cpython.PyInterpreterState_New",  # an interpreter without this hook
)
# modules of native code that do the same without an event
REFUSED_MODULES = {
    "_ctypes",
    "_interpreters",
    "_multiprocessing",
    "_posixshmem",
    "_posixsubprocess",
    "_testcapi",
    "_testinternalcapi",
    "_xxsubinterpreters",
}
HARMLESS = {"os.putenv", "os.unsetenv", "os.fwalk", "os.walk"}
# events whose arguments that are texts or bytes are paths, to be inside the folder
CHANGES_FILES = {
    "os.chmod",
    "os.link",
    "os.mkdir",
    "os.remove",
    "os.rename",
    "os.rmdir",
    "os.symlink",
    "os.truncate",
    "os.utime",
}
READS_FILES = {"os.chdir", "os.listdir", "os.scandir"}
STREAMS = {"/dev/stdin", "/dev/stdout", "/dev/stderr", "/dev/null"}


def set_limits(limits: dict[str, int]) -> None:
    """Set resource limits by name, as far as the platform knows and permits them."""
    for name, value in limits.items():
        kind = getattr(resource, name, None)
        if kind is None:
            continue
        hard = resource.getrlimit(kind)[1]
        if hard != resource.RLIM_INFINITY:
            value = min(value, hard)
        # the soft limit on CPU time sends a signal of its own, the hard one just kills
        ends = value + 1 if name == "RLIMIT_CPU" and hard == resource.RLIM_INFINITY else value
        try:
            resource.setrlimit(kind, (value, ends))
        except (ValueError, OSError):  # macOS knows RLIMIT_AS and takes no number for it
            continue


def audit_hook(folder: str) -> Callable[[str, tuple[Any, ...]], None]:
    """Make the hook that refuses what a solution of a programming task has no need of.

    Reading is allowed in the folder and in Python's library, writing in the folder.
    """
    realpath, sep = os.path.realpath, os.sep
    library = [realpath(path) for path in sys.path if path]
    private = realpath(folder)

    def check_path(event: str, path: Any, allowed: list[str]) -> None:
        if isinstance(path, int) or path is None:
            return
        shown = os.fsdecode(path)
        real = realpath(shown)
        if not any(real == root or real.startswith(root + sep) for root in allowed):
            raise PermissionError(f"{event} outside the working directory is not allowed: {shown}")

    def hook(event: str, args: tuple[Any, ...]) -> None:
        if event == "open":
            path, _, flags = args
            if isinstance(path, int):
                return
            if not isinstance(path, str | bytes):  # io.FileIO asks it for the path a second time
                raise PermissionError("open takes a path that is a text here")
            if os.fsdecode(path) in STREAMS:
                return
            writes = flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND)
            check_path(event, path, [private] if writes else [private, *library])
        elif event == "import":
            if str.__str__(args[0]) in REFUSED_MODULES:  # a subclass may compare as it likes
                raise PermissionError(f"the module {args[0]} is not allowed")
        elif event in READS_FILES:
            check_path(event, args[0], [private, *library])
        elif event in CHANGES_FILES:
            for value in args:
                if isinstance(value, str | bytes):
                    check_path(event, value, [private])
        elif event not in HARMLESS and event.startswith(REFUSED):
            raise PermissionError(f"{event} is not allowed")

    return hook


def solution_traceback(error: BaseException) -> str:
    """Format an exception without the frames of this file, which mean nothing to the model."""
    told: traceback.TracebackException | None = traceback.TracebackException.from_exception(error)
    whole = told
    while told is not None:
        frames = [frame for frame in told.stack if frame.filename != __file__]
        told.stack = traceback.StackSummary.from_list(frames)
        told = told.__cause__ or told.__context__
    return "".join(whole.format()) if whole is not None else ""


def refuse_thread(*_: Any, **__: Any) -> None:
    """Stand for the functions that start a thread."""
    raise PermissionError("threads are not allowed")


def run(program: str, snippet: str | None) -> dict[str, Any]:
    """Run the program, and then the snippet in its namespace; say what became of them.

    With a snippet the program is a module that is imported: its ``if __name__ == "__main__"`` does
    not run, since the snippet calls what it needs.
    """
    space: dict[str, Any] = {"__name__": "__main__" if snippet is None else "solution"}
    execute, translate = exec, compile  # the program may put others into builtins
    try:
        for name, text in ((SOURCE, program), (TESTS, snippet)):
            if text is not None:
                linecache.cache[name] = (len(text), None, text.splitlines(True), name)
                execute(translate(text, name, "exec"), space)
        sys.stdout.flush()
    except SystemExit as error:
        if snippet is None and error.code in (None, 0):
            return {"status": "finished"}
        return {"status": "exited", "message": f"SystemExit: {error.code}"}
    except MemoryError:
        return {"status": "memory"}  # there may be no room to format anything
    except BaseException as error:
        return {"status": "raised", "message": solution_traceback(error)}
    return {"status": "finished"}


def seal_process() -> None:
    """Let the kernel hold what it can; ``ctypes``, which asks it, cannot be imported again."""
    path = os.path.join(os.path.dirname(os.path.abspath(__file__)), "sealing.py")
    spec = importlib.util.spec_from_file_location("sealing", path)
    assert spec is not None
    assert spec.loader is not None
    sealing = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sealing)
    sealing.seal(os.getcwd(), [found for found in sys.path if found], streams=(0, 1))
    for name in [name for name in sys.modules if name.partition(".")[0] in ("ctypes", "_ctypes")]:
        del sys.modules[name]


def main() -> None:
    """Read the job, confine this process, run the program and write the report."""
    exchange = int(sys.argv[1])
    with open(exchange, "rb", closefd=False) as file:
        job = json.load(file)
    os.ftruncate(exchange, 0)
    builtins.exit = builtins.quit = sys.exit  # type: ignore[assignment]  # -S leaves them out
    for name in ("start_new_thread", "start_new"):  # no events before Python 3.12
        setattr(_thread, name, refuse_thread)
    sys.argv = [SOURCE]
    set_limits(job["limits"])
    seal_process()
    sys.addaudithook(audit_hook(os.getcwd()))
    write, as_json = os.pwrite, json.JSONEncoder().encode  # as they are before the program runs
    report = run(job["program"], job["snippet"])
    write(exchange, as_json({**report, "token": job["token"]}).encode(), 0)


if __name__ == "__main__":
    main()
