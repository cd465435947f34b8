"""A pytest plugin: what happened in each test of another library's suite, one line of JSON each.

FUSED_SD_RECORD    the file that gets the lines
FUSED_SD_SWAP      "1": ours replace theirs before any test module is imported
FUSED_SD_SCALE     a factor on every loss of ours: a comparison that does not see 1.02 is worthless
"""

import json
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

SWAPPED = os.environ.get("FUSED_SD_SWAP") == "1"
SCALE = float(os.environ.get("FUSED_SD_SCALE", "1"))


@dataclass
class Watch:
    """What happens in one test.

    Attributes:
        logged: Values that training logged, to be compared with those of the other run.
        ours: Calls that ours answered.
        counts: How often whatever else is watched happened, by name.
        values: Numbers that the test itself compared with its own reference.
        worst: The largest difference of them, in units of the test's tolerance.
    """

    logged: list[dict[str, float]] = field(default_factory=list)
    ours: int = 0
    counts: Counter[str] = field(default_factory=Counter)
    values: int = 0
    worst: float = 0.0


watch = Watch()


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_protocol() -> Iterator[None]:
    watch.__init__()  # type: ignore[misc]
    yield


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.when != "call" and report.outcome == "passed":
        return
    line = {"test": report.nodeid, "outcome": report.outcome, **vars(watch)}
    if report.outcome == "failed":
        line["why"] = str(report.longrepr).splitlines()[-1][:200]
    elif report.outcome == "skipped":
        line["why"] = str(report.longrepr[-1])[:200].removeprefix("Skipped: ")
    with Path(os.environ["FUSED_SD_RECORD"]).open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")
