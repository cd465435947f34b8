"""The wheel and the source distribution hold what they should, whatever the checkout looks like.

They are built from a copy of the tree by setuptools itself, as ``make build`` builds them, without
a network and without an isolated environment.
"""

import email
import pathlib
import re
import shutil
import stat
import subprocess
import sys
import tarfile
import zipfile

import pytest

import fused_sd

ROOT = pathlib.Path(__file__).parents[2]
LINKED = ("kernels", "integrations")
FOLDERS = ("fused_sd", *LINKED)
FOR_TESTS = ("tests", "benchmarks", "docs")
FILES = (
    *("pyproject.toml", "MANIFEST.in", "README.md", "LICENSE", "Makefile"),
    *("constraints.txt", "mkdocs.yml", "CHANGELOG.md", "CITATION.cff", ".pre-commit-config.yaml"),
)
CACHES = shutil.ignore_patterns("__pycache__", "*.py[co]", ".DS_Store")
BUILD = (
    "from setuptools import build_meta as backend\n"
    "backend.build_sdist({out!r}); backend.build_wheel({out!r})"
)


def build(tree):
    """Build both distributions of a tree; return the wheel's files, by name, and the archive."""
    out = tree.parent / "dist"
    out.mkdir()
    command = [sys.executable, "-W", "error::UserWarning", "-c", BUILD.format(out=str(out))]
    run = subprocess.run(command, cwd=tree, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "no files found matching" not in run.stdout + run.stderr  # what MANIFEST.in names
    (wheel,), (archive,) = out.glob("*.whl"), out.glob("*.tar.gz")
    return files_of(wheel), wheel, archive


def files_of(wheel):
    with zipfile.ZipFile(wheel) as opened:
        return {name: opened.read(name) for name in opened.namelist()}


def files_below(root, folder):
    """The files of a folder, by their paths from the root; links are not followed."""
    return {
        path.relative_to(root).as_posix()
        for path in (root / folder).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts and path.name != ".DS_Store"
    }


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """A copy of the tree, links as links."""
    copy = tmp_path_factory.mktemp("checkout") / "fused_sd"
    for folder in (*FOLDERS, *FOR_TESTS):
        shutil.copytree(ROOT / folder, copy / folder, symlinks=True, ignore=CACHES)
    for name in FILES:
        shutil.copy(ROOT / name, copy / name)
    return copy


@pytest.fixture(scope="module")
def built(tree):
    return build(tree)


def test_the_wheel_holds_every_file_of_the_library_and_no_other(built, tree):
    files, *_ = built
    packaged = {name for name in files if ".dist-info/" not in name}
    own = {name for name in files_below(tree, "fused_sd") if name.split("/")[1] not in LINKED}
    assert packaged == own.union(
        *({f"fused_sd/{name}" for name in files_below(tree, folder)} for folder in LINKED)
    )
    assert packaged >= {
        "fused_sd/py.typed",
        "fused_sd/credit/templates/map.html",
        "fused_sd/demo/templates/report.html",
        "fused_sd/kernels/tuned.json",
        "fused_sd/kernels/programs/rows.py",
        "fused_sd/integrations/trl/sdpo.py",
        "fused_sd/integrations/examples/verl_sdpo.sh",
        "fused_sd/integrations/examples/verl_on_cpu/agents.yaml",
        "fused_sd/integrations/verl/recipes/sdpo.yaml",
    }


def test_scripts_stay_executable(built):
    with zipfile.ZipFile(built[1]) as opened:
        scripts = [entry for entry in opened.infolist() if entry.filename.endswith(".sh")]
    assert scripts
    assert all(entry.external_attr >> 16 & stat.S_IXUSR for entry in scripts)


def test_every_pattern_of_package_data_matches_a_file():
    settings = pytest.importorskip("tomllib").loads((ROOT / "pyproject.toml").read_text())
    for package, patterns in settings["tool"]["setuptools"]["package-data"].items():
        folder = ROOT / package.replace(".", "/")
        for pattern in patterns:
            assert list(folder.glob(pattern)), (package, pattern)


def test_the_source_distribution_holds_what_the_tests_need(built, tree):
    with tarfile.open(built[2]) as opened:
        held = {entry.name.partition("/")[2] for entry in opened if entry.isfile()}
    needed = {*FILES}.union(*(files_below(tree, folder) for folder in (*LINKED, *FOR_TESTS)))
    assert needed <= held
    assert not any(name.startswith(("fused_sd/kernels/", "fused_sd/integr")) for name in held)


def test_the_source_distribution_builds_the_same_wheel(built, tmp_path):
    with tarfile.open(built[2]) as opened:
        opened.extractall(tmp_path, filter="data")
    (unpacked,) = tmp_path.iterdir()
    assert build(unpacked)[0] == built[0]


def test_a_checkout_without_links_builds_the_same_wheel(built, tree, tmp_path):
    """Without symbolic links git writes a file that holds the link's target, as on Windows."""
    checkout = tmp_path / "fused_sd"
    shutil.copytree(tree, checkout, symlinks=True, ignore=shutil.ignore_patterns("build", "*.egg*"))
    for name in LINKED:
        link = checkout / "fused_sd" / name
        target = str(link.readlink())
        link.unlink()
        link.write_text(target)
    assert build(checkout)[0] == built[0]


def test_the_metadata_says_what_an_installer_needs(built):
    files, *_ = built
    folder = f"fused_sd-{fused_sd.__version__}.dist-info"
    metadata = email.message_from_bytes(files[f"{folder}/METADATA"])
    assert metadata["Version"] == fused_sd.__version__
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Description-Content-Type"] == "text/markdown"
    assert {"trl", "verl", "verdicts", "demo"} <= set(metadata.get_all("Provides-Extra"))
    points = files[f"{folder}/entry_points.txt"].decode()
    assert re.findall(r"(\S+) = (fused_sd\S+)", points) == [
        ("fused-sd", "fused_sd.cli:main"),
        ("fused_sd", "fused_sd.cli:main"),
        ("fused_sd", "fused_sd.integrations.verl.plugin"),
    ]


def test_the_changelog_and_the_citation_follow_the_version():
    changelog = (ROOT / "CHANGELOG.md").read_text()
    assert re.search(rf"^## \[{re.escape(fused_sd.__version__)}\]", changelog, re.MULTILINE)
    citation = (ROOT / "CITATION.cff").read_text()
    assert "cff-version: 1.2.0" in citation
    assert f"\nversion: {fused_sd.__version__}\n" in citation


def test_ruff_is_the_same_before_a_commit_and_in_make_check():
    (pinned,) = re.findall(r"^ruff==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert f"rev: v{pinned} " in (ROOT / ".pre-commit-config.yaml").read_text()
