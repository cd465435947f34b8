"""Versions: what the checks of this repository run with is written down."""

import re
from importlib.metadata import version
from pathlib import Path

import pytest

tomllib = pytest.importorskip("tomllib")

ROOT = Path(__file__).parents[2]
NAME = re.compile(r"[\w.-]+")


def canonical(name):
    return re.sub(r"[-_.]+", "-", name).lower()


def pins():
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    stripped = [line.partition("#")[0].strip() for line in lines]
    return [line for line in stripped if line]


def test_each_pin_names_one_version_and_no_address():
    for pin in pins():
        assert re.fullmatch(r"[\w.-]+==[\w.+!]+", pin), pin
    names = [canonical(NAME.match(pin)[0]) for pin in pins()]
    assert len(set(names)) == len(names)


def test_no_requirement_has_an_address():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"].values()
    for requirement in [*project["dependencies"], *(name for extra in extras for name in extra)]:
        assert "@" not in requirement
        assert "://" not in requirement
    for text in (ROOT / "Makefile").read_text(encoding="utf-8").splitlines():
        assert not re.search(r"--(trusted-host|extra-index-url|index-url)", text)


def test_the_installed_versions_are_the_pinned():
    for pin in pins():
        name, _, wanted = pin.partition("==")
        try:
            found = version(name)
        except ModuleNotFoundError:  # of another environment
            continue
        assert found.partition("+")[0] == wanted, name
