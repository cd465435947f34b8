"""Which versions of verl are accepted, and which of them were tried."""

import subprocess
import types

import pytest

from fused_sd.integrations.verl import TRIED_COMMIT, versions


@pytest.mark.parametrize("verl", ["0.9.1", "0.9.1.post1", "0.9.2rc1", "0.9.7", "0.10.0.dev"])
def test_releases_and_the_main_branch_are_supported(verl):
    assert versions.unsupported_reason(verl) is None
    assert versions.is_development(verl) == (verl == "0.10.0.dev")


@pytest.mark.parametrize("verl", ["0.9.0", "0.9.1.dev0", "0.10.0rc1", "0.10.0", "0.11.0.dev", "x"])
def test_other_versions_are_not(verl):
    assert f"got {verl};" in versions.unsupported_reason(verl)


def test_the_commit_that_was_tried_is_the_one_of_main_that_is_not_marked():
    assert versions.untried_reason("0.9.1", None) is None
    assert versions.untried_reason("0.10.0.dev", TRIED_COMMIT) is None
    assert "abc was not" in versions.untried_reason("0.10.0.dev", "abc")


def test_the_commit_of_a_checkout_is_not_that_of_a_repository_around_it(tmp_path):
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b", "-C", str(tmp_path)]
    for command in (["init", "-q"], ["commit", "-q", "--allow-empty", "-m", "one"]):
        subprocess.run([*git, *command], check=True)
    head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True).stdout
    (tmp_path / "site-packages" / "verl").mkdir(parents=True)
    for folder, commit in ((tmp_path, head.strip()), (tmp_path / "site-packages", None)):
        package = types.ModuleType("verl")
        package.__file__ = str(folder / "verl" / "__init__.py")
        assert versions.commit_of(package) == commit
