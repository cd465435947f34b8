"""Another library's own tests, run twice: with its classes and functions, and with ours instead."""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
RELATIVE, ABSOLUTE = 1e-4, 1e-5  # of a logged value, in fp32
NUM_LOGS = 20  # of each test: after more steps rounding has led two equal trainings apart


@dataclass(frozen=True)
class Suite:
    """Whose tests, and how they are run.

    Attributes:
        peer: The library's name.
        plugin: The module that puts ours in the place of theirs.
        files: Test files that run by default, relative to the checkout.
        prepare: Copies the tests into a working directory, and writes there what they need.
        counts: What the plugin counts and the table shows.
        environment: Variables of the tests' process.
        only: pytest's -k unless the caller gives another.
    """

    peer: str
    plugin: str
    files: tuple[str, ...]
    prepare: Callable[[Path, Path], None]
    counts: tuple[str, ...] = ()
    environment: dict[str, str] = field(default_factory=dict)
    only: str = ""


@dataclass
class Comparison:
    """What one file's tests did with theirs and with ours.

    Attributes:
        file: The file's name.
        stock: Each outcome's number of tests with theirs.
        ours: The same with ours.
        counts: What the plugin counted, with theirs and with ours.
        values: Values that were compared: logged ones with the other run's, and with ours those
            that the tests compare with their own reference.
        worst: The largest difference of them, in units of the tolerance.
        failing: Tests that fail with theirs, with the reason.
        lost: Tests that fail with ours, or are not run, and did not fail with theirs.
        differ: Tests with a logged value out of tolerance, with that value.
        skipped: Each reason to skip with ours what runs with theirs, and its number of tests.
        answered: Calls that ours answered.
        untouched: Tests that pass without such a call.
    """

    file: str
    stock: Counter[str] = field(default_factory=Counter)
    ours: Counter[str] = field(default_factory=Counter)
    counts: tuple[Counter[str], Counter[str]] = field(
        default_factory=lambda: (Counter(), Counter())
    )
    values: int = 0
    worst: float = 0.0
    failing: list[str] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)
    differ: list[str] = field(default_factory=list)
    skipped: Counter[str] = field(default_factory=Counter)
    answered: int = 0
    untouched: int = 0


def run(
    suite: Suite,
    file: str,
    folder: Path,
    *,
    swap: bool,
    more: Sequence[str] = (),
    **variables: object,
) -> Any:
    """Run one file of tests; return what the plugin recorded of each, by name.

    Args:
        suite: Whose tests.
        file: The file, relative to the folder.
        folder: The working directory that ``suite.prepare`` made.
        swap: Whether ours take the place of theirs.
        more: Arguments of pytest.
        **variables: Of the plugin: ``scale`` becomes FUSED_SD_SCALE.
    """
    record = folder / f"record-{swap}.jsonl"
    record.unlink(missing_ok=True)
    environment = os.environ | suite.environment
    environment |= {f"FUSED_SD_{name.upper()}": str(value) for name, value in variables.items()}
    environment |= {
        "FUSED_SD_SWAP": str(int(swap)),
        "FUSED_SD_RECORD": str(record),
        "PYTHONPATH": os.pathsep.join(map(str, (folder, ROOT, HERE))),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
    }
    arguments = ["-q", "-p", "recording", "-p", suite.plugin, "-p", "no:cacheprovider"]
    arguments += ["-c", os.devnull, f"--rootdir={folder}", "-W", "ignore", "--tb=line"]
    ran = subprocess.run(
        [sys.executable, "-m", "pytest", *arguments, file, *more],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
    )
    if not record.exists():
        raise SystemExit(f"{file} ran no test:\n{ran.stdout[-3000:]}{ran.stderr[-3000:]}")
    found = map(json.loads, record.read_text(encoding="utf-8").splitlines())
    return {line["test"]: line for line in found}


def compare(file: str, stock: dict[str, Any], ours: dict[str, Any]) -> Comparison:
    """Compare the two runs of a file."""
    result = Comparison(Path(file).name)
    for ran, outcomes, counts in (
        (stock, result.stock, result.counts[0]),
        (ours, result.ours, result.counts[1]),
    ):
        for line in ran.values():
            outcomes[line["outcome"]] += 1
            counts.update(line["counts"])
    result.answered = sum(line["ours"] for line in ours.values())
    for test, before in stock.items():
        name = test.split("::", 1)[-1]
        after = ours.get(test, {"outcome": "missing", "why": "not run"})
        if before["outcome"] == "failed":
            result.failing.append(f"{name}: {before['why']}")
        if after["outcome"] == "skipped":
            if before["outcome"] != "skipped":
                result.skipped[after["why"]] += 1
        elif after["outcome"] != "passed":
            if before["outcome"] != "failed" or after["why"] != before["why"]:
                result.lost.append(f"{name}: {after['why']}")
        else:
            result.untouched += not after["ours"]
            result.values += after["values"]
            result.worst = max(result.worst, after["worst"])
            if before["outcome"] == "passed":
                _compare_logs(result, name, before["logged"], after["logged"])
    return result


def _compare_logs(
    result: Comparison, name: str, before: list[dict[str, float]], after: list[dict[str, float]]
) -> None:
    if len(before) != len(after):
        result.differ.append(f"{name}: logged {len(after)} times, not {len(before)}")
    for number, (one, two) in enumerate(zip(before[:NUM_LOGS], after)):
        for key, value in one.items():
            result.values += 1
            if key not in two:
                result.differ.append(f"{name}: {key} is not logged")
                continue
            off = abs(two[key] - value) / (ABSOLUTE + RELATIVE * abs(value))
            result.worst = max(result.worst, off)
            if off > 1:
                result.differ.append(f"{name}: {key}[{number}] {value:g} -> {two[key]:g}")


def lines_of(result: Comparison, counts: Sequence[str]) -> list[str]:
    """Return a comparison as text: a row, and below it what is wrong and what was left out."""
    outcomes = [
        " ".join(f"{n} {kind}" for kind, n in c.items()) for c in (result.stock, result.ours)
    ]
    row = f"{result.file:44}{outcomes[0]:32}{outcomes[1]:32}{result.values:9}{result.worst:9.3f}"
    row += f"{result.answered:8}{result.untouched:10}"
    row += "".join(f"   {n}: {result.counts[0][n]} -> {result.counts[1][n]}" for n in counts)
    reasons = Counter(line.split(": ", 1)[-1] for line in result.failing)
    notes = [f"  fails with theirs, {number}: {why}" for why, number in reasons.items()]
    notes += [f"  skipped with ours, {number}: {why}" for why, number in result.skipped.items()]
    notes += [f"  lost: {line}" for line in result.lost]
    return [row, *notes, *(f"  differs: {line}" for line in result.differ)]


def copied(checkout: Path, folder: Path, package: str) -> None:
    """Copy a package of tests from a checkout into a working directory."""
    shutil.copytree(checkout / package, folder / package)


def main(suite: Suite, doc: str, **choices: Sequence[str]) -> int:
    """Run a suite as a command.

    Args:
        suite: Whose tests.
        doc: The script's docstring.
        **choices: More variables of the plugin, each with its values, the default first.

    Returns:
        The exit status: 1 if a test is lost or a value differs.
    """
    parser = argparse.ArgumentParser(description=doc.split("\n")[0])
    parser.add_argument("checkout", type=Path, help=f"folder with {suite.peer}'s tests")
    parser.add_argument("files", nargs="*", default=suite.files, help="test files in it")
    parser.add_argument("--only", default=suite.only, help=f"pytest's -k, {suite.only!r} if absent")
    parser.add_argument("--scale", type=float, default=1, help="a factor on our losses, to be seen")
    for name, values in choices.items():
        parser.add_argument(f"--{name}", choices=values, default=values[0])
    options = vars(parser.parse_args())
    checkout, files, only = (options.pop(name) for name in ("checkout", "files", "only"))
    more = ["-k", only] if only else []
    head = f"{'file':44}{suite.peer:32}{'ours':32}{'values':>9}{'worst':>9}"
    print(f"{head}{'answers':>8}{'without':>10}", flush=True)
    wrong = 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        suite.prepare(checkout, folder)
        for file in files:
            ways = [
                run(suite, file, folder, swap=swap, more=more, **options) for swap in (False, True)
            ]
            result = compare(file, *ways)
            print("\n".join(lines_of(result, suite.counts)), flush=True)
            wrong += len(result.lost) + len(result.differ)
    return 1 if wrong else 0
