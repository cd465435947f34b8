"""Programs that try to break out of ``run_program``: what holds them, and what does not."""

import inspect
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest

from fused_sd.integrations.verdicts import CodeVerifier, Limits, programs
from fused_sd.integrations.verdicts.folder import temporary_folder
from fused_sd.integrations.verdicts.programs import run_program

pytestmark = pytest.mark.skipif(os.name != "posix", reason="no POSIX processes here")

SEALING = Path(programs.SCRIPT).with_name("sealing.py")
SHORT = Limits(cpu_seconds=1, wall_seconds=1.5)
LONG = Limits(cpu_seconds=30, wall_seconds=60.0)
# The hook reads these names when it is called, and they are the program's to change.
WITHOUT_HOOK = """
import __main__ as script
class Every:
    def __contains__(self, item):
        return True
script.REFUSED, script.STREAMS = (), Every()
script.REFUSED_MODULES = script.CHANGES_FILES = script.READS_FILES = set()
import ctypes
libc = ctypes.CDLL(None, use_errno=True)
def call(number, *values):
    if libc.syscall(number, *values) < 0:
        raise OSError(ctypes.get_errno(), "refused")
"""
WRITE_REPORT = """
import os
def write(data):
    for descriptor in range(3, 64):
        try:
            os.pwrite(descriptor, data, 0)
        except OSError:
            pass
    os._exit(0)
"""


@pytest.fixture(scope="module")
def held():
    """What this machine's kernel holds; the tests that need both are skipped elsewhere."""
    asked = subprocess.run(
        [sys.executable, "-I", "-S", SEALING], capture_output=True, text=True, check=True
    )
    if asked.stdout.split() != ["files,", "calls"]:
        pytest.skip(f"this kernel holds {asked.stdout}")


def run(program, limits=LONG, **given):
    return run_program(textwrap.dedent(program), limits=limits, **given)


def successes(attempts, preamble):
    """Run attempts in one process; return the names of those that raised nothing."""
    lines = [preamble]
    for name, attempt in attempts.items():
        body = textwrap.indent(attempt, "    ")
        lines.append(f"try:\n{body}\nexcept BaseException: pass\nelse: print({name!r})")
    outcome = run("\n".join(lines) + "\nprint('end')")
    assert outcome.status == "finished", outcome.message
    assert outcome.stdout.endswith("end\n")
    return outcome.stdout.split("\n")[:-2]


def outside(folder):
    """Attempts to reach others' processes, files and networks."""
    parent, new = os.getpid(), str(folder / "new")
    kept = str(folder / "kept")
    return {
        "fork": "import os\nif os.fork() == 0: os._exit(0)",
        "exec": "import os\nos.execv('/bin/true', ['true'])",
        "spawn": "import os\nos.posix_spawn('/bin/true', ['true'], {})",
        "shell": "import os\nassert os.system('true') == 0",
        "thread": "import threading\nthreading.Thread(target=print).start()",
        "interpreter": "import _xxsubinterpreters as i\n"
        f"i.run_string(i.create(), {f'open({kept!r})'!r})",
        "pipe to a child": "import subprocess\nsubprocess.run(['true'])",
        "socket": "import socket\nsocket.socket()",
        "pair of sockets": "import socket\nsocket.socketpair()",
        "signal to the parent": f"import os\nos.kill({parent}, 0)",
        "signal to the group": "import os\nos.kill(0, 0)",
        "signal by descriptor": f"import os\nos.pidfd_open({parent})",
        "priority of the parent": f"import os\nos.setpriority(0, {parent}, 19)",
        "processors of the parent": f"import os\nos.sched_setaffinity({parent}, {{0}})",
        "limits": "import resource\nresource.setrlimit(resource.RLIMIT_CPU, (1, 1))",
        "read": f"open({kept!r}).read()",
        "read the environment of the parent": f"open('/proc/{parent}/environ', 'rb').read()",
        "read the memory of the parent": f"open('/proc/{parent}/mem', 'rb')",
        "list": "import os\nos.listdir('/')",
        "write": f"open({new!r}, 'w')",
        "append": f"open({kept!r}, 'a')",
        "truncate": f"import os\nos.truncate({kept!r}, 0)",
        "remove": f"import os\nos.remove({kept!r})",
        "folder": f"import os\nos.mkdir({new!r})",
        "link": f"import os\nos.link({kept!r}, 'kept')",
        "symbolic link": f"import os\nos.symlink({str(folder)!r}, 's')\nopen('s/new', 'w')",
        "move out": f"import os\nopen('a', 'w').close()\nos.rename('a', {new!r})",
        "pipe": f"import os\nos.mkfifo({new!r})",
        "node": f"import os\nos.mknod({new!r})",
        "owner": f"import os\nos.chown({kept!r}, 0, 0)",
        "attribute": f"import os\nos.setxattr({kept!r}, 'user.x', b'x')",
        "root": "import os\nos.chroot('.')",
        "memory of others by name": "import _posixshmem\n_posixshmem.shm_open('/x', 66, 0o600)",
    }


def by_number(folder):
    """Attempts at calls that Python has no function for, on x86-64."""
    parent = os.getpid()
    return {
        "clone": "call(56, 17, 0, 0, 0, 0)",
        "vfork": "call(58)",
        "ptrace": f"call(101, 16, {parent}, 0, 0)",
        "memory of the parent": f"call(310, {parent}, 0, 0, 0, 0, 0)",
        "limits of the parent": f"call(302, {parent}, 0, (ctypes.c_uint64 * 2)(1, 1), 0)",
        "queued signal": f"call(129, {parent}, 0, 0)",
        "ring": "call(425, 1, (ctypes.c_char * 120)())",
        "x32 table": "call(0x40000000 + 41, 2, 1, 0)",
        "segment": "call(29, 0, 4096, 0o1600)",
        "queue": "call(240, b'x', 66, 0o600, 0)",
        "namespace": "call(272, 0x10000000)",
        "trace": "call(298, 0, 0, -1, -1, 0)",
        "key": "call(248, b'user', b'x', b'x', 1, -1)",
        "undo": "call(444, None, 0, 0)",
    }


def assert_untouched(folder, before):
    assert sorted(path.name for path in folder.iterdir()) == ["kept"]
    assert (folder / "kept").read_text() == "text"
    assert (os.getpriority(os.PRIO_PROCESS, 0), os.sched_getaffinity(0)) == before


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "kept").write_text("text")
    before = os.getpriority(os.PRIO_PROCESS, 0), os.sched_getaffinity(0)
    yield tmp_path
    assert_untouched(tmp_path, before)


@pytest.mark.skipif(sys.platform != "linux", reason="the hook alone does not see some of them")
def test_nothing_gets_out(folder, held):
    assert successes(outside(folder), "") == []


def test_the_kernel_holds_what_has_disarmed_the_hook(folder, held):
    assert successes(outside(folder), WITHOUT_HOOK) == []
    if os.uname().machine == "x86_64":
        assert successes(by_number(folder), WITHOUT_HOOK) == []


def test_the_hook_can_be_disarmed(held):
    """The docstring says so; should it ever be wrong, the kernel is tested by nothing above."""
    disarmed = WITHOUT_HOOK + "print(libc.getpid() > 0)"
    assert run(disarmed).stdout == "True\n"


@pytest.mark.parametrize(
    "program",
    [
        # what the hook calls is replaced
        """
        import os, posixpath
        here = os.getcwd()
        posixpath.realpath = posixpath.abspath = lambda path, **_: here
        posixpath._joinrealpath = lambda *_, **__: (here, True)
        os.fsdecode = lambda path: here
        print(open("/etc/passwd").read())
        """,
        # a path that is another one each time it is asked
        """
        import io
        class Path:
            asked = 0
            def __fspath__(self):
                self.asked += 1
                return "/etc/passwd" if self.asked == 1 else "x"
        print(io.FileIO(Path()).read())
        """,
        # a name that is no member of any set
        """
        class Name(str):
            __hash__ = lambda self: 0
            __eq__ = lambda self, other: False
        print(__import__(Name("_ctypes")))
        """,
        "import gc\nprint(gc.get_objects())",
        "import gc\nprint(gc.get_referrers(print))",
    ],
)
def test_ways_around_the_hook(program, held):
    outcome = run(program)
    assert (outcome.status, outcome.stdout) == ("raised", "")
    assert "PermissionError" in outcome.message


@pytest.mark.parametrize(
    "replaced",
    [
        "builtins.exec = lambda *_: None",
        "compile_ = builtins.compile\nbuiltins.compile = lambda *_: compile_('0', 'x', 'exec')",
        "import json\nreal = json.dumps\njson.dumps = lambda d: real({**d, 'status': 'finished'})",
        "import os\nos.pwrite = lambda *_: 0",
        "import sys\nsys.exit = builtins.exit = lambda *_: None",
        "import sys\nsys.settrace(lambda *_: exec('raise SystemExit(0)'))",
    ],
)
def test_replacing_what_runs_the_tests_is_no_success(replaced):
    assert run(f"import builtins\n{replaced}", snippet="assert False").status != "finished"


def test_what_a_test_expects_to_be_printed_is_nowhere_in_the_process():
    expected = "9f86d081884c7d65"
    search = """
        def look():
            frame = me.gi_frame.f_back
            while frame:
                print(frame.f_globals, frame.f_locals)
                frame = frame.f_back
            yield
        me = look()
        next(me)
        import os
        for descriptor in range(64):
            try:
                print(os.pread(descriptor, 10**6, 0))
            except OSError:
                pass
    """
    judge = CodeVerifier(limits=LONG)
    program = f"```python\n{textwrap.dedent(search)}\n```"
    (result,) = judge.results(program, [{"stdin": "question", "stdout": expected}])
    assert "question" in result.outcome.stdout  # it has looked
    assert expected not in result.outcome.stdout
    assert not result.passed


def test_what_statements_do_not_hold():
    """Documented: statements run among the program's objects."""
    equal = "class Equal:\n    def __eq__(self, other): return True\ndef f(x): return Equal()"
    assert run(equal, snippet="assert f(2) == 4").status == "finished"


@pytest.mark.parametrize(
    "written",
    [
        "b'[' * 200_000",
        "b'null'",
        "b'{\"token\": 1}'",
        "b'\\xff\\xfe'",
        "b'9' * 5000",
    ],
)
def test_a_hostile_report_is_no_report(written):
    program = f"{WRITE_REPORT}\nwrite({written})"
    assert run(program, snippet="x = 1").status == "exited"


@pytest.mark.parametrize("status, message", [([1], ""), ("finished", {}), ("won", ""), (None, "")])
def test_a_report_with_the_right_token_and_wrong_types(status, message):
    """Frames hold the token; what is read must be a report all the same."""
    forge = f"""
        import json
        def forge():
            frame = me.gi_frame.f_back
            while "job" not in frame.f_locals:
                frame = frame.f_back
            token = frame.f_locals["job"]["token"]
            report = dict(token=token, status={status!r}, message={message!r})
            yield write(json.dumps(report).encode())
        me = forge()
        next(me)
    """
    assert run(WRITE_REPORT + textwrap.dedent(forge), snippet="x = 1").status == "exited"


def test_signals_without_a_name():
    number = signal.SIGRTMIN + 6 if hasattr(signal, "SIGRTMIN") else signal.SIGUSR1
    outcome = run(f"import signal\nsignal.raise_signal({int(number)})")
    assert outcome.status == "killed"
    assert outcome.message.startswith("killed by ")


@pytest.mark.parametrize(
    "program",
    [
        # neither hears of its time
        "import signal\nsignal.pthread_sigmask(0, range(1, 60))\nwhile True: pass",
        "10 ** 10 ** 9",
        "import re\nre.match('(a+)+b', 'a' * 60)",
        "import time\nwhile True:\n    try: time.sleep(9)\n    except BaseException: pass",
        "import sys\nwhile True: sys.stderr.write('x' * 10_000)",
    ],
)
def test_time_ends(program):
    start = time.monotonic()
    assert run(program, SHORT).status in ("time", "killed")
    assert time.monotonic() - start < SHORT.wall_seconds + 10  # on a busy machine


@pytest.mark.skipif(sys.platform == "darwin", reason="macOS does not limit memory")
@pytest.mark.parametrize(
    "program",
    [
        "b'x' * 2**33",
        "import mmap\nmmap.mmap(-1, 2**34)",
        "import itertools\nlist(itertools.repeat('x', 10**9))",
        "x = [1]\nwhile True: x += x",
    ],
)
def test_memory_ends(program):
    assert run(program).status in ("memory", "raised")


def test_a_secret_of_the_environment_stays(monkeypatch):
    monkeypatch.setenv("SECRET", "7c9e6679")
    outcome = run("import os\nprint(dict(os.environ))\nprint(open('/proc/self/environ').read())")
    assert "7c9e6679" not in outcome.stdout + outcome.message


def test_folders_inside_folders_are_deleted(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    kept = tmp_path / "kept"
    kept.mkdir()
    (kept / "file").write_text("text")
    home, calls = os.getcwd(), sys.getrecursionlimit()
    with temporary_folder() as folder:
        try:
            os.chdir(folder)
            for _ in range(150):
                os.mkdir("inside")
                os.chdir("inside")
        finally:
            os.chdir(home)
        os.symlink(kept, f"{folder}/link")
        os.makedirs(f"{folder}/closed/deep")
        os.chmod(f"{folder}/closed", 0)
        sys.setrecursionlimit(
            len(inspect.stack()) + 100
        )  # a call for each folder would be too many
    sys.setrecursionlimit(calls)
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]
    assert (kept / "file").read_text() == "text"


def test_a_working_directory_that_is_moved_or_full(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    for program in (
        "import os\nos.rmdir(os.getcwd())",
        "import os\nos.rename(os.getcwd(), os.getcwd() + 'x')",
        "for n in range(500): open(str(n), 'w')",
        "import os\nos.chmod('.', 0)",
    ):
        run(program)
    assert list(tmp_path.iterdir()) == []


def test_many_at_once_leave_nothing(tmp_path, monkeypatch):
    """Names in the folder for temporary files are drawn, and no two programs share one."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    seen = []
    program = "import os\nopen('x', 'x').write('x')\nprint(os.getcwd())"
    threads = [threading.Thread(target=lambda: seen.append(run(program).stdout)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(seen)) == 4
    assert list(tmp_path.iterdir()) == []


def test_numbers_of_calls_are_those_of_the_headers():
    """The tables of both machines, beside the kernel's headers where they are installed."""
    scope = {"__name__": "sealing"}
    exec(compile(SEALING.read_text(), str(SEALING), "exec"), scope)
    known = {**scope["NUMBERS"], **scope["TO_ITSELF"], "prlimit64": scope["PRLIMIT"]}
    headers = ("x86_64-linux-gnu/asm/unistd_64.h", "asm-generic/unistd.h")
    for column, header in enumerate(headers):
        path = Path("/usr/include") / header
        if not path.is_file():
            pytest.skip(f"no {path} here")
        lines = [line.split() for line in path.read_text().splitlines() if "__NR" in line]
        found = {line[1]: line[2] for line in lines if len(line) > 2}
        for name, numbers in known.items():
            wanted = None if numbers[column] is None else str(numbers[column])
            assert found.get(f"__NR_{name}") == wanted, (header, name)


def test_the_job_is_read_before_the_program_and_gone():
    program = """
        import os
        for descriptor in range(64):
            try:
                print(os.pread(descriptor, 10**6, 0))
            except OSError:
                pass
    """
    outcome = run(program, snippet="assert 'secret'")
    assert "b''" in outcome.stdout
    assert "secret" not in outcome.stdout
