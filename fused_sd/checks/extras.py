"""The check that the packages of an extra are installed, before anything imports them."""

from importlib.util import find_spec


def require(extra: str, *modules: str) -> None:
    """Check that modules can be found, without importing them.

    Args:
        extra: the extra of the distribution fused-sd that installs them.
        modules: names of top-level modules.

    Raises:
        ModuleNotFoundError: one is missing; the message says which, and the command that helps.
    """
    missing = [name for name in modules if find_spec(name) is None]
    if missing:
        raise ModuleNotFoundError(
            f"{', '.join(missing)} must be installed here, got no such module; "
            f"pip install 'fused-sd[{extra}]'",
            name=missing[0],
        )
