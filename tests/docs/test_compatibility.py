"""The tables of versions say what is declared, pinned and was tried, and agree with each other."""

import re

import pytest
from manual import ROOT

pytest.importorskip("tomllib")
from packaging.specifiers import SpecifierSet

from docs import try_versions, versions
from fused_sd.measuring import tried
from fused_sd.measuring.markdown_block import Block

CI = ROOT / ".github" / "workflows" / "ci.yml"
TEXT = versions.PAGE.read_text()


def table(name):
    """The rows of a block that a command writes, headings first."""
    block = Block(versions.PAGE, name)
    written = TEXT[len(block.before) : -len(block.after)]
    lines = [line for line in written.splitlines() if line[:2] == "| "]
    return [line.strip("| ").split(" | ") for line in lines]


ROWS = {row[0]: row[1:] for row in table("versions")}
SETS = tried.load()
DECLARED = {"python": "Python"} | {name: name for name in tried.PACKAGES}  # names of both tables


@pytest.mark.parametrize("expected", versions.rows(), ids=lambda row: row[0])
def test_a_row_is_what_is_declared_and_pinned_and_ran_within_it(expected):
    name, declared, pinned = expected
    assert ROWS[name][:2] == [declared, pinned], "run make versions"
    for ran in set(ROWS[name][2:]) - {versions.NONE}:
        assert ran in SpecifierSet(declared)
        assert pinned in (ran, versions.NONE)


def test_the_table_has_no_other_row():
    assert set(ROWS) - {"package", "---"} == {"Python", *versions.PACKAGES}


def test_what_was_tried_is_on_the_page():
    assert table("tried")[2:] == try_versions.rows(SETS), "run python -m docs.try_versions"


@pytest.mark.parametrize("row", SETS, ids=lambda row: " ".join(row.versions.values()))
def test_no_set_within_what_is_declared_has_failed(row):
    declared = versions.declared()
    within = [
        version in SpecifierSet(declared[DECLARED[name]]) for name, version in row.versions.items()
    ]
    assert not (all(within) and row.failed())


def test_the_oldest_versions_that_are_declared_were_tried():
    declared = versions.declared()
    for name, key in DECLARED.items():
        (oldest,) = re.findall(r">=([\d.]+)", declared[key])
        found = [row.versions[name] for row in SETS if name in row.versions and not row.failed()]
        assert any(ran in SpecifierSet(f"=={oldest}.*") for ran in found), name


def test_junit_reports_are_counted(tmp_path):
    path = tmp_path / "report.xml"
    path.write_text(
        "<testsuites><testsuite><testcase name='a'/><testcase name='b'><failure/></testcase>"
        "<testcase name='c'><failure/><error/></testcase><testcase name='d'><skipped/></testcase>"
        "</testsuite></testsuites>"
    )
    counts = try_versions.counts_of(path)
    assert counts == {"passed": 1, "failed": 2, "skipped": 1}
    assert try_versions.outcome(counts) == "1 passed, 2 failed, 1 skipped"
    assert try_versions.outcome(None) == versions.NONE


@pytest.mark.parametrize("extra", try_versions.SMOKE)
def test_the_selected_tests_are_there(extra):
    for test in try_versions.SMOKE[extra] + try_versions.COMPILE[extra]:
        path, _, name = test.partition("::")
        assert f"def {name}" in (ROOT / path).read_text()


def test_requirements_without_an_interpreter_are_refused():
    with pytest.raises(SystemExit, match="--python must name an interpreter"):
        try_versions.main(["torch==2.13.0"])


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
