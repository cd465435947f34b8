"""Trials of mutants: one pytest session collects the tests, and each mutant runs in a fork of it.

The first fork runs every test once and notes which lines it executes and how long it takes.  A
mutant is then tried by tests that execute its line, one case of each test before second cases, the
quick ones first, until a test fails or the time allowed is spent.
"""

import collections
import gc
import json
import os
import pathlib
import random
import resource
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable

import pytest
from _pytest.runner import runtestprotocol
from mutants import Mutant, functions_of, put_in_place

MEMORY = 8 << 30  # bytes of address space: a mutant may ask for more than the machine has
BROKEN = "a fault of the trial itself:"
SLOWEST = 4.0  # seconds of a test that still is tried


class Trials:
    """The plugin: in place of pytest's own loop, it tries the mutants and calls ``done`` for each.

    Args:
        root: the repository.
        mutants: what to try.
        seconds: CPU time that the tests of one mutant may take, by the first fork's clock.
        cases: cases of one parametrised test, drawn at random; 0: all.
        seed: draws them.
        done: is told the mutant and what became of it: the test that failed, or "survived", ...
    """

    def __init__(
        self,
        root: pathlib.Path,
        mutants: list[Mutant],
        seconds: float,
        cases: int,
        seed: int,
        done: Callable[[Mutant, str], None],
    ) -> None:
        self.root, self.mutants, self.seconds, self.done = root, mutants, seconds, done
        self.cases, self.random = cases, random.Random(seed)
        self.executed: dict[tuple[str, int], list[int]] = collections.defaultdict(list)
        self.time: dict[int, float] = {}
        self.passed: set[tuple[int, ...]] = set()  # tests that pass in this order

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        if self.cases:
            by_test = collections.defaultdict(list)
            for item in items:
                by_test[item.nodeid.split("[")[0]].append(item)
            kept = set()
            for tests in by_test.values():
                kept.update(self.random.sample(tests, min(self.cases, len(tests))))
            items[:] = [item for item in items if item in kept]

    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        self.items = session.items
        paths = {str(self.root / mutant.path) for mutant in self.mutants}
        self.functions = functions_of(paths)
        gc.freeze()  # a fork's collector leaves the shared pages alone
        notes = in_fork(self._note_lines, 3600, 3600)
        if not notes:
            raise RuntimeError("the tests without a mutant ended badly: run them by themselves")
        for n, (seconds, failed, lines) in enumerate(json.loads(notes)):
            if failed:
                print(f"left out, because it fails without a mutant: {self.items[n].nodeid}")
                continue
            self.time[n] = seconds
            for path, line in lines:
                self.executed[path, line].append(n)
        print(f"{len(self.items)} tests, {sum(self.time.values()):.0f} s of CPU time", flush=True)
        for mutant in self.mutants:
            self.done(mutant, self._try(mutant))
        return True

    def _note_lines(self) -> str:
        paths = {str(self.root / mutant.path): mutant.path for mutant in self.mutants}
        aliases = {}  # a code's name of its file: ours, or None; kernels/ has two names
        lines: set[tuple[str, int]] = set()

        def on_line(frame, event, argument):
            if event == "line":
                lines.add((aliases[frame.f_code.co_filename], frame.f_lineno))
            return on_line

        def on_call(frame, event, argument):
            name = frame.f_code.co_filename
            if name not in aliases:
                aliases[name] = paths.get(name) or paths.get(os.path.realpath(name))
            return on_line if aliases[name] else None

        notes = []
        threading.settrace(on_call)
        for n, item in enumerate(self.items):
            lines.clear()
            start = time.process_time()
            sys.settrace(on_call)
            following = self.items[n + 1] if n + 1 < len(self.items) else None
            reports = runtestprotocol(item, log=False, nextitem=following)
            sys.settrace(None)
            failed = any(report.failed for report in reports)
            notes.append((time.process_time() - start, failed, sorted(lines)))
        return json.dumps(notes)

    def _first_to_fail(self, tests: list[int]) -> int | None:
        """Run tests one after the other; return the place of the first that fails."""
        for place, n in enumerate(tests):
            # pytest keeps a module's fixtures for the item that is said to come next
            following = self.items[tests[place + 1]] if place + 1 < len(tests) else None
            reports = runtestprotocol(self.items[n], log=False, nextitem=following)
            if any(report.failed for report in reports):
                return place
        return None

    def tests_of(self, mutant: Mutant) -> list[int]:
        """Return the tests for a mutant, in the order in which they are tried."""
        tests = [n for n in self.executed[mutant.path, mutant.line] if self.time[n] < SLOWEST]
        tests.sort(key=self.time.__getitem__)
        seen: collections.Counter[str] = collections.Counter()
        rank = {}
        for n in tests:
            name = self.items[n].nodeid.split("[")[0]
            rank[n] = seen[name]
            seen[name] += 1
        tests.sort(key=rank.__getitem__)  # stable: the quick ones first within a rank
        chosen, spent = [], 0.0
        for n in tests:
            spent += self.time[n]
            if chosen and spent > self.seconds:
                break
            chosen.append(n)
        return chosen

    def _try(self, mutant: Mutant) -> str:
        """Return the test that notices a mutant, and that passes at the same place without it."""
        while tests := self.tests_of(mutant):

            def run(tests: list[int] = tests) -> str:
                if not put_in_place(self.root, mutant, self.functions):
                    return "not built"
                place = self._first_to_fail(tests)
                return "survived" if place is None else str(place)

            limit = 10 + 5 * sum(self.time[n] for n in tests)
            end = in_fork(run, limit, 60 + 10 * limit) or "died, or took too long"
            if not end.isdigit():
                return end
            noticed = tests[int(end)]
            if self._pass(tests[: int(end) + 1]):
                return self.items[noticed].nodeid
            print(f"left out, because it fails behind others: {self.items[noticed].nodeid}")
            self.time[noticed] = SLOWEST
        return "not executed"

    def _pass(self, tests: list[int]) -> bool:
        """Return whether tests pass without a mutant, in a fork of their own."""
        if tuple(tests) not in self.passed:
            if in_fork(lambda: str(self._first_to_fail(tests)), 600, 6000) != "None":
                return False
            self.passed.add(tuple(tests))
        return True


def in_fork(run: Callable[[], str], cpu_seconds: float, seconds: float) -> str:
    """Return what ``run`` returns in a forked child; empty where the child was killed."""
    sys.stdout.flush()
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        for stream in (1, 2):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
        signal.setitimer(signal.ITIMER_PROF, cpu_seconds)
        signal.setitimer(signal.ITIMER_REAL, seconds)
        with os.fdopen(writing, "w") as pipe:
            try:
                pipe.write(run())
            except BaseException:
                pipe.write(f"{BROKEN} {traceback.format_exc()}")
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        answer = pipe.read()
    os.waitpid(child, 0)
    if answer.startswith(BROKEN):
        raise RuntimeError(answer)
    return answer
