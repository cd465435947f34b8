"""Version checks: the installed verl must be one that this adapter supports."""

from importlib.metadata import PackageNotFoundError, version

from packaging.specifiers import SpecifierSet

from fused_sd.integrations.verl import SUPPORTED_VERL


def installed(distribution: str) -> str | None:
    """Return the version of an installed distribution, or None."""
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def unsupported_reason(verl_version: str | None) -> str | None:
    """Say why this version of verl is not supported; return None if it is."""
    if verl_version is None:
        return f"verl is not installed; pip install 'verl{SUPPORTED_VERL}'"
    if SpecifierSet(SUPPORTED_VERL).contains(verl_version, prereleases=True):
        return None
    return (
        f"verl must be {SUPPORTED_VERL}, got {verl_version}; install that, or a fused_sd that "
        "supports this verl"
    )
