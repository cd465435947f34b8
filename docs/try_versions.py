"""Install one set of versions in a fresh environment, test it there, and store what came of it.

    python -m docs.try_versions --python python3.12 --folder build/tried torch==2.11.0 trl==1.12.0

installs the library with its extra "trl" and these versions, and of everything else the newest that
they allow; runs a selection of tests that takes about a minute; adds a line to
``fused_sd/measuring/tried.jsonl`` and writes the table of the manual's page anew; and removes the
environment, which takes up to 7 GB where PyTorch comes with CUDA.

``--extra verl`` tests the verl plugin instead, and ``--extra none`` the losses alone.  ``--run
compile`` compiles the kernels for GPUs that are absent, and ``--run whole`` runs every test that
the extra is for.  Without ``--python`` the table alone is written.
"""

import argparse
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path
from xml.etree import ElementTree

from benchmarks.markdown import table
from docs import versions
from fused_sd.measuring import tried
from fused_sd.measuring.markdown_block import Block

LOSSES = (
    "tests/losses/test_defaults.py",
    "tests/losses/test_properties.py",
    "tests/kernels/test_kernels.py::test_losses_through_triton_equal_the_reference",
    "tests/test_cli.py::test_every_loss_keeps_every_promise",
    "tests/test_cli.py::test_a_quick_verification_measures_every_loss_at_one_kl",
    "tests/test_cli.py::test_env_prints_versions",
)
TRL, VERL = "tests/integrations/with_trl", "tests/integrations/with_verl"
SMOKE = {
    "none": LOSSES,
    "trl": (
        *LOSSES,
        "tests/integrations/test_transformers.py",
        "tests/integrations/test_adapter_teacher.py::test_every_kind_teaches_what_it_should",
        "tests/integrations/test_adapter_teacher.py::test_acting_leaves_the_student_as_it_was",
        f"{TRL}/test_trl_trainer.py::test_a_method_trains",
        f"{TRL}/test_fused_grpo.py",
        f"{TRL}/test_fused_gkd.py",
    ),
    "verl": (
        *LOSSES,
        f"{VERL}/test_config.py",
        f"{VERL}/test_registered_losses.py",
        f"{VERL}/test_engine.py",
    ),
}
EVERY = ("tests", "-n", "2", "--dist", "loadfile")
WHOLE = {"none": EVERY, "trl": EVERY, "verl": (VERL, "-n", "2", "--dist", "loadgroup")}
COMPILE = dict.fromkeys(SMOKE, ("tests/kernels/test_offline_compile.py",))
# what other packages deprecate of each other, and PEFT's advice, is no error of a set
WARNINGS = (
    *("FutureWarning", "DeprecationWarning", "PendingDeprecationWarning"),
    "UserWarning:peft.tuners.tuners_utils",
)
SELECTIONS = {"smoke": SMOKE, "whole": WHOLE, "compile": COMPILE}  # tests by extra


def main(arguments: list[str]) -> None:
    """Try the set that the arguments name, if any, and write the page's table."""
    options = parser().parse_args(arguments)
    if options.requirements and not options.python:
        raise SystemExit("--python must name an interpreter for the versions, got none; add it")
    if options.python:
        options.folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=options.folder.resolve()) as folder:
            tried.store(attempt(Path(folder), options))
    write_table()


def parser() -> argparse.ArgumentParser:
    """Return the command line's parser."""
    made = argparse.ArgumentParser(prog="python -m docs.try_versions", description=__doc__)
    made.formatter_class = argparse.RawDescriptionHelpFormatter
    made.add_argument("requirements", nargs="*", metavar="NAME==VERSION", help="what pip installs")
    made.add_argument("--python", help="the interpreter that makes the environment")
    made.add_argument("--folder", type=Path, default=Path("build/tried"), help="where it is made")
    made.add_argument("--extra", choices=SMOKE, default="trl", help="the extra that is installed")
    made.add_argument(
        "--run", action="append", choices=SELECTIONS, help="may be repeated (default smoke)"
    )
    return made


def attempt(folder: Path, options: argparse.Namespace) -> tried.Tried:
    """Return what the tests make of a set of versions in an environment in a folder."""
    python = environment(folder, options.python, options.extra, options.requirements)
    tests = {
        name: run_tests(python, SELECTIONS[name][options.extra], folder / f"{name}.xml")
        for name in options.run or ["smoke"]
    }
    return tried.Tried(versions_of(python), system(), tests)


def environment(folder: Path, python: str, extra: str, requirements: list[str]) -> str:
    """Make an environment with the library and these versions; return its interpreter."""
    subprocess.run([python, "-m", "venv", str(folder / "venv")], check=True)
    made = str(folder / "venv" / "bin" / "python")
    # what is imported is compiled then: the rest of these packages would take minutes
    install = [made, "-m", "pip", "install", "-q", "--no-compile"]
    subprocess.run([*install, "-e", f"{versions.ROOT}[{extra},test]", *requirements], check=True)
    return made


def run_tests(python: str, selected: tuple[str, ...], report: Path) -> dict[str, int]:
    """Run tests, which print their failures; return how many passed, failed and were skipped."""
    theirs = [f"-Wdefault::{name}" for name in WARNINGS]
    command = [python, "-m", "pytest", "-q", *theirs, f"--junitxml={report}", *selected]
    subprocess.run(command, cwd=versions.ROOT, env={"OMP_NUM_THREADS": "1", **os.environ})
    return counts_of(report)


def counts_of(report: Path) -> dict[str, int]:
    """Return how many tests passed, failed and were skipped, of pytest's JUnit report."""
    found = [{child.tag for child in case} for case in ElementTree.parse(report).iter("testcase")]
    failed = sum(bool(tags & {"failure", "error"}) for tags in found)
    skipped = sum("skipped" in tags for tags in found)
    return {"passed": len(found) - failed - skipped, "failed": failed, "skipped": skipped}


def versions_of(python: str) -> dict[str, str]:
    """Return the versions that are compared, of an environment."""
    found = versions.installed(python)
    named = {"python": found["Python"]} | {name: found[name] for name in tried.PACKAGES}
    return {name: version for name, version in named.items() if version != versions.NONE}


def system() -> str:
    """Return the system and the kind of processor."""
    return f"{platform.system()} {platform.machine()}"


def rows(sets: list[tried.Tried]) -> list[list[str]]:
    """Return the table's rows: versions, and of each selection what came of it."""
    return [
        [
            *(row.versions.get(name, versions.NONE) for name in ("python", *tried.PACKAGES)),
            *(outcome(row.tests.get(name)) for name in SELECTIONS),
        ]
        for row in sets
    ]


def outcome(counts: dict[str, int] | None) -> str:
    """Return counts as a cell of the table."""
    if counts is None:
        return versions.NONE
    return ", ".join(f"{number} {name}" for name, number in counts.items() if number)


def write_table() -> None:
    """Write the stored sets into the manual's page."""
    headings = ("Python", *tried.PACKAGES, *SELECTIONS)
    Block(versions.PAGE, "tried").fill(table(headings, rows(tried.load()), texts=len(headings)))


if __name__ == "__main__":
    main(sys.argv[1:])
