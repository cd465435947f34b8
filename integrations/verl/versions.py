"""Version checks: the installed verl must be one that this adapter supports."""

import json
import subprocess
from importlib.metadata import PackageNotFoundError, distribution, version
from pathlib import Path
from types import ModuleType

from fused_sd.integrations.verl import DEVELOPMENT_VERL, SUPPORTED_VERL, TRIED_COMMIT


def installed(name: str) -> str | None:
    """Return the version of an installed distribution, or None."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def unsupported_reason(verl_version: str | None) -> str | None:
    """Say why this version of verl is not supported; return None if it is."""
    if verl_version is None:
        return f"verl is not installed; pip install 'fused-sd[verl]' ({SUPPORTED_VERL})"
    if _is_within(SUPPORTED_VERL, verl_version) or is_development(verl_version):
        return None
    return (
        f"verl must be {SUPPORTED_VERL}, got {verl_version}; install that, or a fused_sd that "
        "supports this verl"
    )


def is_development(verl_version: str) -> bool:
    """Whether this is verl's main branch, whose version says nothing about its state."""
    return _is_within(DEVELOPMENT_VERL, verl_version)


def untried_reason(verl_version: str, commit: str | None) -> str | None:
    """Say what was not tried of a supported verl; return None if it was tried as it is."""
    if not is_development(verl_version) or commit == TRIED_COMMIT:
        return None
    return (
        f"a development version changes without a new number; {TRIED_COMMIT[:9]} was tried and "
        f"{'no other commit' if commit is None else f'{commit[:9]} was not'}"
    )


def commit_of(package: ModuleType) -> str | None:
    """Return the commit of a package that runs from a git checkout, or was installed from one."""
    folder = Path(str(package.__file__)).parent
    if (folder.parent / ".git").exists():
        command = ["git", "-C", str(folder.parent), "rev-parse", "HEAD"]
        try:
            return subprocess.run(command, capture_output=True, text=True).stdout.strip() or None
        except OSError:  # no git here
            return None
    try:
        found = distribution(package.__name__)
    except PackageNotFoundError:
        return None
    if Path(str(found.locate_file(package.__name__))) != folder:
        return None  # the package was found elsewhere, before the installed one
    origin = json.loads(found.read_text("direct_url.json") or "{}")
    commit: str | None = origin.get("vcs_info", {}).get("commit_id")
    return commit


def _is_within(specifiers: str, verl_version: str) -> bool:
    # imported late: without the extra packaging may be missing, and the doctor still reports
    from packaging.specifiers import SpecifierSet
    from packaging.version import InvalidVersion

    try:
        return SpecifierSet(specifiers).contains(verl_version, prereleases=True)
    except InvalidVersion:
        return False
