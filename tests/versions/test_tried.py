"""Versions that were tried are stored once, and an installed set is compared with them."""

import json

import pytest

import fused_sd
from fused_sd.cli import main
from fused_sd.measuring import tried
from fused_sd.measuring.tried import Tried, load, store, verdict


def row(failed=0, name="smoke", **versions):
    return Tried(versions, "Linux x86_64", {name: {"passed": 9, "failed": failed, "skipped": 1}})


OLD = row(python="3.10.13", torch="2.10.0", trl="1.12.0")
NEW = row(python="3.13.0", torch="2.15.0", trl="1.16.0")
BROKEN = row(3, python="3.14.1", torch="2.16.0", trl="1.16.0")


@pytest.mark.parametrize(
    "versions, says",
    [
        ({"python": "3.13.7", "torch": "2.15.0+cu130", "trl": "1.16.0"}, "together"),
        ({"python": "3.10.1", "torch": "2.10.0"}, "together"),  # the losses alone
        ({"python": "3.13.0", "torch": "2.10.0", "trl": "1.16.0"}, "not together: each is one"),
        ({"python": "3.11.7", "torch": "2.13.0.dev20260101", "trl": "1.14.2"}, "not together"),
        ({"python": "3.13.0", "torch": "2.15.1"}, "no: torch 2.15.1 is newer than 2.15.0; see"),
        ({"python": "3.13.0", "torch": "2.9.1"}, "no: torch 2.9.1 is older than 2.10.0; see"),
        ({"python": "3.10.0", "torch": "2.10.0", "verl": "0.9.1"}, "no: verl was not installed; "),
        ({"python": "3.14.0", "torch": "2.16.0"}, "together, and 3 tests failed; see docs/"),
        (
            {"python": "3.14.0", "torch": "2.15.0", "trl": "1.2"},
            "no: python 3.14 is newer than 3.13, trl 1.2 is older than 1.12.0; see",
        ),
    ],
)
def test_a_set_is_compared_with_those_that_were_tried(versions, says):
    said = verdict(versions, [BROKEN, OLD, NEW])
    assert said.startswith(says)
    assert said == "together" or said.endswith("see docs/reference/compatibility.md")


def test_of_equal_sets_the_one_that_passed_counts():
    versions = {"python": "3.13.0", "torch": "2.15.0"}
    broken = row(1, **versions, trl="1.15.0")
    assert verdict(versions, [broken, NEW]) == "together"


def test_kernels_that_compile_to_slow_code_are_no_failure():
    slow = NEW._replace(tests=NEW.tests | row(1, "compile").tests)
    assert slow.failed() == 0
    assert verdict(NEW.versions, [slow]) == "together"


def test_a_set_is_stored_once_with_all_that_was_run_newest_first(tmp_path):
    path = tmp_path / "tried.jsonl"
    assert load(path) == []
    for one in (OLD, NEW, OLD._replace(tests=row(2, "whole").tests), row(1, **OLD.versions)):
        store(one, path)
    newest, oldest = load(path)
    assert newest == NEW
    assert oldest.versions == OLD.versions
    assert oldest.tests == row(1).tests | row(2, "whole").tests
    assert oldest.failed() == 3


def test_the_stored_sets_are_in_order_and_name_known_packages(tmp_path):
    again = tmp_path / "tried.jsonl"
    for one in load():
        assert {"python", "torch", "triton"} <= set(one.versions) <= {"python", *tried.PACKAGES}
        assert set(one.tests) <= {"smoke", "whole", "compile"}
        store(one, again)
    assert again.read_text() == tried.STORED.read_text()


def test_env_says_whether_the_versions_were_tried(capsys, monkeypatch):
    assert main(["env", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    versions = {name: facts[name] for name in ("python", *tried.PACKAGES)}
    installed = {name: v for name, v in versions.items() if v != "not installed"}
    assert "torch" in installed
    assert facts["fused_sd"] == fused_sd.__version__
    monkeypatch.setattr(tried, "load", lambda: [row(**installed)])
    assert main(["env"]) == 0
    assert "\nversions tried " in (shown := capsys.readouterr().out)
    assert shown.rstrip().endswith(" together")
