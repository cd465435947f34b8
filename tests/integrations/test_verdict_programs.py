"""Programs under limits: what ends as it should, and what is stopped."""

import os
import sys
import textwrap
import threading

import pytest

from fused_sd.integrations.verdicts import Limits
from fused_sd.integrations.verdicts.programs import run_program

pytestmark = pytest.mark.skipif(os.name != "posix", reason="no POSIX processes here")

# short where a test waits for the end of time; generous where a slow machine must not fail it
SHORT = Limits(cpu_seconds=1, wall_seconds=3.0)
LONG = Limits(cpu_seconds=30, wall_seconds=60.0)


def run(program, limits=LONG, **given):
    return run_program(textwrap.dedent(program), limits=limits, **given)


def test_a_program_reads_and_prints():
    outcome = run("print(int(input()) * 2)", stdin="21\n")
    assert (outcome.status, outcome.stdout) == ("finished", "42\n")


def test_text_is_utf8_whatever_the_locale():
    outcome = run("import sys\nprint(open(0).read()[::-1])", stdin="né")
    assert (outcome.status, outcome.stdout) == ("finished", "én\n")


def test_a_snippet_sees_the_program_as_a_module():
    program = """
        def double(x):
            return 2 * x
        if __name__ == "__main__":
            raise RuntimeError("not imported")
    """
    assert run(program, snippet="assert double(2) == 4").status == "finished"
    outcome = run(program, snippet="assert double(2) == 5")
    assert outcome.status == "raised"
    assert 'File "test.py", line 1' in outcome.message
    assert "AssertionError" in outcome.message


def test_a_traceback_shows_the_program_alone():
    outcome = run("def f(n):\n    return 1 / n\n\nf(0)")
    assert outcome.status == "raised"
    assert 'File "solution.py", line 2, in f\n    return 1 / n\n' in outcome.message
    assert outcome.message.endswith("ZeroDivisionError: division by zero\n")
    assert "confined" not in outcome.message
    refused = run("import os\nos.fork()")
    assert refused.message.endswith("PermissionError: os.fork is not allowed\n")
    assert "confined" not in refused.message


@pytest.mark.parametrize("program", ["while True: pass", "import time\ntime.sleep(1000)"])
def test_time_is_limited(program):
    assert run(program, SHORT).status == "time"


def test_a_program_that_does_not_hear_of_its_time_is_killed():
    program = """
        import signal
        signal.signal(signal.SIGXCPU, lambda *_: None)
        signal.signal(signal.SIGTERM, lambda *_: None)
        while True:
            pass
    """
    assert run(program, SHORT).status in ("killed", "time")


@pytest.mark.skipif(sys.platform == "darwin", reason="macOS does not limit memory")
@pytest.mark.parametrize(
    "program", ["held = [0] * 10**9", "held = []\nwhile True:\n    held.append('a' * 10**6)"]
)
def test_memory_is_limited(program):
    assert run(program).status == "memory"


def test_output_is_limited():
    outcome = run("while True:\n    print('flood' * 100)", Limits(30, 60.0, output_kib=16))
    assert outcome.status == "output"
    assert len(outcome.stdout) == 16 * 1024


def test_a_flood_whose_errors_are_caught_stays_limited():
    program = """
        import os
        for _ in range(10**5):
            try:
                os.write(1, b"x" * 1000)
            except OSError:
                pass
    """
    outcome = run(program, Limits(30, 60.0, output_kib=16))
    assert outcome.status == "output"
    assert len(outcome.stdout) == 16 * 1024


@pytest.mark.parametrize(
    "program",
    [
        "import socket\nsocket.socket()",
        "import urllib.request\nurllib.request.urlopen('http://127.0.0.1:1')",
        "import socket\nsocket.getaddrinfo('localhost', 80)",
        "import os\nwhile True:\n    os.fork()",
        "import os\nos.system('true')",
        "import os\nos.execv('/bin/sh', ['sh'])",
        "import os\nos.posix_spawn('/bin/sh', ['sh'], {})",
        "import subprocess\nsubprocess.run(['true'])",
        "import multiprocessing\nmultiprocessing.Process(target=print).start()",
        "import pty\npty.spawn('/bin/sh')",
        "import threading\nthreading.Thread(target=print).start()",
        "import ctypes\nctypes.CDLL(None)",
        "import os\nos.kill(os.getppid(), 9)",
        "import os\nos.chdir('/')",
        "open('/etc/hostname').read()",
        "import os\nos.listdir('/')",
        "import resource\nresource.setrlimit(resource.RLIMIT_CPU, (999, 999))",
    ],
)
def test_reaching_out_is_refused(program):
    outcome = run(program)
    assert outcome.status == "raised"
    assert "not allowed" in outcome.message


@pytest.mark.parametrize(
    "program",
    [
        "open({!r}, 'w').write('x')",
        "import os\nos.open({!r}, os.O_CREAT | os.O_WRONLY)",
        "import os\nos.symlink(os.path.dirname({0!r}), 'x')\nopen('x/new', 'w')",
        "open('written', 'w').write('x')\nimport os\nos.rename('written', {!r})",
        "import os\nos.mkdir({!r})",
        "import pathlib\npathlib.Path({!r}).write_text('x')",
    ],
)
def test_nothing_is_written_outside(program, tmp_path):
    outcome = run(program.format(str(tmp_path / "new")))
    assert outcome.status == "raised"
    assert "outside the working directory is not allowed" in outcome.message
    assert not list(tmp_path.iterdir())


def test_nothing_is_removed_outside(tmp_path):
    kept = tmp_path / "kept"
    kept.write_text("text")
    for program in ("import os\nos.remove({!r})", "import os\nos.truncate({!r}, 0)"):
        assert run(program.format(str(kept))).status == "raised"
    assert run(f"import shutil\nshutil.rmtree({str(tmp_path)!r})").status == "raised"
    assert kept.read_text() == "text"


def test_files_inside_are_allowed():
    outcome = run(
        "open('a', 'w').write('text')\nimport os\nprint(os.listdir('.'), open('a').read())"
    )
    assert (outcome.status, outcome.stdout) == ("finished", "['a'] text\n")


def test_a_program_may_delete_what_is_in_its_directory():
    outcome = run(
        "import os, shutil\nos.makedirs('a/b')\nshutil.rmtree(os.getcwd(), ignore_errors=True)\n"
        "print(os.path.exists('a'))"
    )
    assert (outcome.status, outcome.stdout) == ("finished", "False\n")


def test_the_environment_and_other_packages_are_absent(monkeypatch):
    monkeypatch.setenv("SECRET", "told")
    outcome = run("import os\nprint(os.environ.get('SECRET'))\nimport torch")
    assert outcome.stdout == "None\n"
    assert "No module named 'torch'" in outcome.message


def test_the_standard_library_is_there():
    outcome = run("""
        import bisect, collections, dataclasses, datetime, decimal, fractions, functools, hashlib
        import heapq, itertools, json, math, operator, queue, random, re, statistics, string, typing
        print(math.gcd(12, 18), random.random() < 1)
    """)
    assert (outcome.status, outcome.stdout) == ("finished", "6 True\n")


def test_what_is_printed_after_the_end_counts():
    outcome = run("import atexit\natexit.register(print, 'bye')\nprint('hi')")
    assert (outcome.status, outcome.stdout) == ("finished", "hi\nbye\n")


def test_exits():
    assert run("print(1)\nexit()").status == "finished"
    assert run("import sys\nsys.exit(0)").status == "finished"
    assert run("import sys\nsys.exit(3)").status == "exited"
    assert run("import os\nos._exit(3)").status == "exited"
    assert run("import os\nos.abort()").status == "killed"


@pytest.mark.parametrize("leave", ["import os\nos._exit(0)", "import sys\nsys.exit(0)", "exit()"])
def test_leaving_before_the_snippet_is_no_success(leave):
    assert run(leave, snippet="assert False").status == "exited"
    outcome = run(f"def f():\n    {leave.replace(chr(10), '; ')}", snippet="f()\nassert False")
    assert outcome.status == "exited"


def test_a_report_of_the_programs_own_is_not_believed():
    program = """
        import json, os
        for descriptor in range(3, 200):
            try:
                os.pwrite(descriptor, json.dumps({"status": "finished"}).encode(), 0)
            except OSError:
                pass
        os._exit(0)
    """
    assert run(program, snippet="assert False").status == "exited"


def test_output_that_is_no_text():
    outcome = run("import sys\nsys.stdout.buffer.write(bytes([255, 65]))")
    assert (outcome.status, outcome.stdout) == ("finished", "\ufffdA")
    assert run("print('\\ud800')").status == "raised"
    assert run("x = '\0'").status == "raised"
    assert run("def f(:").message.endswith("SyntaxError: invalid syntax\n")


def test_endless_recursion_is_an_error_of_the_program():
    outcome = run("def f(n):\n    return f(n + 1)\nf(0)")
    assert "RecursionError" in outcome.message
    assert len(outcome.message) < 5000


def test_programs_run_from_several_threads():
    found = {}

    def work(n):
        found[n] = run(f"print({n})").stdout

    threads = [threading.Thread(target=work, args=(n,)) for n in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {n: f"{n}\n" for n in range(6)}


def test_no_process_and_no_descriptor_is_left():
    psutil = pytest.importorskip("psutil")

    def held():
        """Other tests of this process may have left children of their own."""
        own = psutil.Process()
        return own.num_fds(), {child.pid for child in own.children(recursive=True)}

    before = held()
    for program in ("print(1)", "raise ValueError", "import os\nos._exit(1)"):
        run(program)
    assert held() == before


@pytest.mark.parametrize(
    "settings",
    [{"cpu_seconds": 0}, {"cpu_seconds": 1.5}, {"wall_seconds": -1}, {"memory_mib": 0}],
)
def test_bad_limits_are_refused(settings):
    with pytest.raises(ValueError, match=f"{next(iter(settings))} must be"):
        Limits(**settings)
