"""The table of versions says what is declared and pinned, and its versions are within both."""

import re

import pytest
from manual import ROOT

pytest.importorskip("tomllib")
from packaging.specifiers import SpecifierSet

from docs import versions

CI = ROOT / ".github" / "workflows" / "ci.yml"
TEXT = versions.PAGE.read_text()
ROWS = {
    row[0]: row[1:]
    for row in (line.strip("| ").split(" | ") for line in TEXT.splitlines() if line[:2] == "| ")
}


@pytest.mark.parametrize("expected", versions.rows(), ids=lambda row: row[0])
def test_a_row_is_what_is_declared_and_pinned_and_ran_within_it(expected):
    name, declared, pinned = expected
    assert ROWS[name][:2] == [declared, pinned], "run make versions"
    for ran in set(ROWS[name][2:]) - {versions.NONE}:
        assert ran in SpecifierSet(declared)
        assert pinned in (ran, versions.NONE)


def test_the_table_has_no_other_row():
    assert set(ROWS) - {"package", "---"} == {"Python", *versions.PACKAGES}


@pytest.mark.skipif(not CI.exists(), reason="a source distribution holds no workflow")
def test_ci_runs_what_the_page_says():
    workflow = CI.read_text()
    (python,) = set(re.findall(r'python-version: "([\d.]+)"', workflow))
    assert f"Python {python} on Linux" in " ".join(TEXT.split())
    assert all(ran.startswith(f"{python}.") for ran in ROWS["Python"][2:])
    assert {"make check", "make test", "make docs"} == set(re.findall(r"run: (.*)", workflow))


def test_requirements_are_taken_apart():
    lines = ["triton>=3.6; sys_platform == 'linux'", "fused-sd[trl]", "trl>=1.12,<2", "fastapi"]
    assert versions.by_name(lines) == {
        "triton": ">=3.6",
        "fused-sd": "",
        "trl": ">=1.12,<2",
        "fastapi": "",
    }
