"""Tests that need verl: not collected where it is absent."""

import importlib.util

import pytest

HAS_VERL = importlib.util.find_spec("verl") is not None
collect_ignore_glob = [] if HAS_VERL else ["test_*.py"]
OURS = "fused_sd|integrations|test_|conftest"


def pytest_configure(config: pytest.Config) -> None:
    if HAS_VERL:  # only warnings that this project's own lines cause are errors
        config.addinivalue_line("filterwarnings", f"ignore:::(?!{OURS})")


@pytest.fixture(scope="session", autouse=True)
def losses_registered() -> None:
    """Register the losses, as the entry point does if fused_sd is installed."""
    from fused_sd.integrations.verl import plugin

    plugin.register_losses()
