"""Programs, run on tests; what fails is the feedback."""

import os
import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from fused_sd.checks import fail
from fused_sd.integrations.verdicts.programs import Limits, Outcome, run_program
from fused_sd.integrations.verdicts.verifier import Verdict, Verifier

FENCED = re.compile(
    r"^[ \t]*```[ \t]*(\S*)[^\n]*\n(.*?)^[ \t]*```[ \t\r]*$", re.DOTALL | re.MULTILINE
)
PYTHON = {"python", "py", "python3"}
LIMIT_TEXTS = {
    "time": "Time limit exceeded",
    "memory": "Memory limit exceeded",
    "output": "Output limit exceeded",
}
SHOWN = 500  # characters of an input or output in the feedback
SHOWN_TRACEBACK = 1500


@dataclass(frozen=True)
class ProgramTest:
    """A test of a program: statements to execute behind it, or its input and what it must print."""

    snippet: str | None = None
    stdin: str = ""
    stdout: str = ""

    @classmethod
    def of(cls, given: Any) -> "ProgramTest":
        """Read a test as a dataset holds it; see ``CodeVerifier``.

        Raises:
            ValueError: it is none.
        """
        if isinstance(given, str):
            return cls(snippet=given)
        if isinstance(given, Mapping):
            if given.get("code") is not None:
                return cls(snippet=given["code"])
            if given.get("stdout") is not None:
                return cls(stdin=given.get("stdin") or "", stdout=given["stdout"])
        rule = "be statements, {'code': statements} or {'stdin': text, 'stdout': text}"
        fail("test", rule, repr(given), "write the column of tests so")


@dataclass(frozen=True)
class ProgramResult:
    """A test and how the program fared; ``outcome`` is None where the program was not run."""

    test: ProgramTest
    outcome: Outcome | None

    @property
    def passed(self) -> bool:
        """Whether the program ended as it should, and printed what it should.

        Outputs are compared word by word: white space does not count.
        """
        if self.outcome is None or self.outcome.status != "finished":
            return False
        if self.test.snippet is not None:
            return True
        return self.outcome.stdout.split() == self.test.stdout.split()


class CodeVerifier(Verifier):
    """Rewards a response whose Python program passes the tests of its row.

    The program is the last fenced block that is marked as Python, or the last without a mark.  It
    is run once for each test, under the limits that ``programs`` describes; please read there what
    they hold and what they do not.  After a test that ran out of time the others are not run.

    The column holds a list of tests for each row: statements such as ``assert f(2) == 4``, which
    are executed behind the program, or mappings ``{"stdin": ..., "stdout": ...}``; a mapping
    ``{"code": statements}`` is a test of the first kind.

    Args:
        column: the dataset's column of tests.
        limits: of one run.
        partial_credit: reward the share of the tests that pass; else all must.
        workers: how many programs run at once; as many as there are processors where None.

    Examples:
        >>> from fused_sd.integrations.verdicts import CodeVerifier
        >>> fence = "`" * 3
        >>> response = f"{fence}python\\ndef double(x):\\n    return x + x\\n{fence}"
        >>> CodeVerifier()([response], tests=[["assert double(4) == 8"]])
        [1.0]
    """

    def __init__(
        self,
        column: str = "tests",
        *,
        limits: Limits | None = None,
        partial_credit: bool = False,
        workers: int | None = None,
    ) -> None:
        super().__init__("code", column)
        if workers is not None and workers < 1:
            fail("workers", "be at least 1", workers, "leave it out for all processors")
        self.limits = limits or Limits()
        self.partial_credit = partial_credit
        self.workers = workers or os.cpu_count() or 1

    def judge(self, response: str, reference: Any) -> Verdict:
        """Judge one response; see ``Verifier.judge``."""
        if not reference:
            return Verdict(None, None)
        results = self.results(response, reference)
        if not results:
            text = "The response holds no Python program: put it between ```python and ```."
            return Verdict(0.0, text)
        failed = [n for n, result in enumerate(results) if not result.passed]
        if not failed:
            return Verdict(1.0, None)
        share = 1 - len(failed) / len(results) if self.partial_credit else 0.0
        return Verdict(share, failure_text(results, failed[0]))

    def judge_all(self, pairs: Sequence[tuple[str, Any]]) -> list[Verdict]:
        """Judge pairs of a response and its tests, several at once."""
        with ThreadPoolExecutor(self.workers) as pool:
            return list(pool.map(lambda pair: self.judge(*pair), pairs))

    def results(self, response: str, tests: Sequence[Any]) -> list[ProgramResult]:
        """Run a response's program on each test; return nothing where it holds no program."""
        if isinstance(tests, str) or not isinstance(tests, Sequence):
            fail(self.column, "be a list of tests", repr(tests), "put a single one into a list")
        program = program_in(response)
        if program is None:
            return []
        results: list[ProgramResult] = []
        out_of_time = False
        for test in map(ProgramTest.of, tests):
            outcome = None
            if not out_of_time:
                outcome = run_program(
                    program, stdin=test.stdin, snippet=test.snippet, limits=self.limits
                )
                out_of_time = outcome.status == "time"
            results.append(ProgramResult(test, outcome))
        return results


def program_in(response: str) -> str | None:
    """Return the last fenced block that is marked as Python, else the last unmarked, else None.

    A block that is not closed counts for nothing: the response was cut.
    """
    marked, unmarked = None, None
    for mark, text in FENCED.findall(response):
        if mark.lower() in PYTHON:
            marked = text
        elif not mark:
            unmarked = text
    return unmarked if marked is None else marked


def failure_text(results: Sequence[ProgramResult], failed: int) -> str:
    """Describe a failing test as a judge of programming contests does, for the model to read."""
    test, outcome = results[failed].test, results[failed].outcome
    assert outcome is not None  # a test is left out only behind one that failed
    trace = shortened(outcome.message, SHOWN_TRACEBACK).rstrip()
    if outcome.status == "finished":
        kind, trace = "Wrong answer", ""
    elif outcome.status in LIMIT_TEXTS:
        kind, trace = LIMIT_TEXTS[outcome.status], ""
    elif outcome.status == "raised" and "AssertionError" in trace and test.snippet is not None:
        kind = "Wrong answer"
    else:
        kind = "Runtime error"
    parts = [f"{kind} on test {failed + 1} of {len(results)}.", trace]
    if test.snippet is not None:
        parts += ["Test:", shortened(test.snippet, SHOWN)]
    else:
        parts += ["Input:", shortened(test.stdin, SHOWN)]
        if outcome.status == "finished":
            parts += ["Output:", shortened(outcome.stdout, SHOWN)]
            parts += ["Expected output:", shortened(test.stdout, SHOWN)]
    return "\n".join(part.rstrip("\n") for part in parts if part)


def shortened(text: str, length: int) -> str:
    """Return a text whose middle is left out where it is long."""
    if len(text) <= length:
        return text
    half = length // 2
    return f"{text[:half]}\n[... {len(text) - 2 * half} characters ...]\n{text[-half:]}"
