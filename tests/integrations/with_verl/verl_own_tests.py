"""verl's own CPU tests without and with the plugin: what passes without it passes with it.

    python tests/integrations/with_verl/verl_own_tests.py CHECKOUT [--timeout 200] [FILE ...]

CHECKOUT is a checkout of verl.  Its tests import its own verl; to try them on the installed verl,
give a folder that holds a copy of ``tests`` alone.  FILEs are relative to CHECKOUT; without any,
the files of AREAS run.  Each runs in two processes: in the first verl loads no plugin, in the
second it loads fused_sd's and is asked for its engines.  The exit status is 1 if a test passes in
the first and not in the second.  Some files need pytest-asyncio.
"""

import argparse
import os
import pathlib
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from xml.etree import ElementTree

import plugin_dists

AREAS = (
    "tests/*_on_cpu.py",
    "tests/checkpoint_engine/*_on_cpu.py",
    "tests/experimental/agent_loop/*_on_cpu.py",
    "tests/models/*_on_cpu.py",
    "tests/plugin/test_*.py",
    "tests/single_controller/*_on_cpu.py",
    "tests/trainer/**/*_on_cpu.py",
    "tests/utils/test_*config*_on_cpu.py",
    "tests/utils/test_*fsdp*_on_cpu.py",
    "tests/utils/test_*model*_on_cpu.py",
    "tests/utils/test_normalize*_on_cpu.py",
    "tests/utils/test_padding_on_cpu.py",
    "tests/utils/test_tokenizer*_on_cpu.py",
    "tests/utils/test_transferqueue*_on_cpu.py",
    "tests/workers/*_on_cpu.py",
    "tests/workers/config/*_on_cpu.py",
)
RUN = """
import contextlib
import os
import signal
import sys
import time
import pytest
import verl

way, timeout, *arguments = sys.argv[1:]
plugin = sys.modules.get("fused_sd.integrations.verl.plugin")
if way == "with":
    assert set(plugin.STATUS.values()) <= {plugin.REGISTERED, plugin.NO_MEGATRON}, plugin.STATUS
else:
    assert plugin is None, "verl loaded the plugin, and was told to load none"
for line in sys.stdin:  # the import of verl takes longer than most files
    file, report, log = line.rstrip().split("\t")
    print(way, file, file=sys.stderr, flush=True)
    child = os.fork()
    if child == 0:
        os.setsid()
        for stream in (1, 2):
            os.dup2(os.open(log, os.O_CREAT | os.O_WRONLY | os.O_APPEND), stream)
        os._exit(pytest.main([*arguments, "--junitxml=" + report, file]))
    until = time.monotonic() + float(timeout)
    while os.waitpid(child, os.WNOHANG)[0] == 0:
        if time.monotonic() > until:
            os.killpg(child, signal.SIGKILL)
        time.sleep(0.1)
    with contextlib.suppress(ProcessLookupError):  # what Ray left behind
        os.killpg(child, signal.SIGKILL)
"""
Ran = tuple[dict[str, str], str]
"""A file's tests with their outcomes, of which a run that did not end has none, and the output."""


def run(
    files: Sequence[pathlib.Path], root: pathlib.Path, *, plugin: bool, timeout: float
) -> list[Ran]:
    """Run each of verl's test files in a fork of a process that imported verl.

    ``root`` holds verl's package ``tests``.
    """
    chosen = {"VERL_USE_EXTERNAL_PLUGINS": "fused_sd" if plugin else "none"}
    if plugin:
        chosen["VERL_ENGINE_VENDOR"] = "fused_sd"
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        settings = folder / "pytest.ini"
        # as verl's workflow, and not what lies above a site-packages
        settings.write_text("[pytest]\nasyncio_mode = auto\n")
        environment = plugin_dists.environment(plugin_dists.write(folder), **chosen)
        environment["PYTHONPATH"] = f"{root}{os.pathsep}{environment['PYTHONPATH']}"
        environment["HF_HUB_OFFLINE"] = "1"  # a model that is not here fails at once, both times
        places = [(folder / f"{n}.xml", folder / f"{n}.txt") for n in range(len(files))]
        asked = [f"{file}\t{report}\t{log}\n" for file, (report, log) in zip(files, places)]
        arguments = ["-q", "-p", "no:cacheprovider", f"--rootdir={root}", f"-c={settings}"]
        way = "with" if plugin else "without"
        subprocess.run(
            [plugin_dists.PYTHON, "-W", "ignore", "-c", RUN, way, str(timeout), *arguments],
            env=environment,
            cwd=root,
            input="".join(asked),
            text=True,
            check=True,
        )
        return [
            (_read(report) if report.exists() else {}, log.read_text(errors="replace"))
            for report, log in places
        ]


def _read(report: pathlib.Path) -> dict[str, str]:
    found: dict[str, str] = {}
    for case in ElementTree.parse(report).iter("testcase"):
        name = f"{case.get('classname')}::{case.get('name')}"
        tags = {child.tag for child in case}
        bad = next((tag for tag in ("failure", "error", "skipped") if tag in tags), "passed")
        found[name] = bad if found.get(name, "passed") == "passed" else found[name]
    return found


def passed(found: dict[str, str]) -> set[str]:
    return {name for name, outcome in found.items() if outcome == "passed"}


def _counts(found: dict[str, str]) -> str:
    counted = Counter(found.values())
    kinds = ("passed", "failure", "error", "skipped")
    return " ".join(f"{counted[kind]:4}" for kind in kinds) if found else "       no end      "


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("checkout", type=pathlib.Path, help="folder with verl's package tests")
    parser.add_argument("files", nargs="*", help="test files, relative to it; default: our areas")
    parser.add_argument("--timeout", type=float, default=200, help="seconds for a file's process")
    args = parser.parse_args()
    root = args.checkout.resolve()
    patterns = args.files or AREAS
    files = sorted({file for pattern in patterns for file in root.glob(pattern)})
    if not files:
        parser.error(f"no test file in {root}")
    begun, totals, lost = time.monotonic(), (Counter(), Counter()), []
    ways = [run(files, root, plugin=plugin, timeout=args.timeout) for plugin in (False, True)]
    print(f"{'':58} without plugin        with plugin")
    print(f"{'':57} pass fail  err skip   pass fail  err skip")
    for file, (before, _), (after, said) in zip(files, *ways):
        gone = sorted(passed(before) - passed(after))
        name = str(file.relative_to(root)).removeprefix("tests/").removesuffix("_on_cpu.py")
        print(f"{name:57} {_counts(before)}   {_counts(after)}", flush=True)
        if gone:
            print("\n".join(["  fails with the plugin:", *gone, said[-3000:]]), flush=True)
        lost += gone
        for total, found in zip(totals, (before, after)):
            total.update(found.values())
    print(f"{len(files)} files in {time.monotonic() - begun:.0f} s")
    for way, total in zip(("without", "with"), totals):
        print(f"{way:8}", ", ".join(f"{number} {kind}" for kind, number in sorted(total.items())))
    print(f"{len(lost)} tests pass without the plugin and not with it")
    return 1 if lost else 0


if __name__ == "__main__":
    sys.exit(main())
