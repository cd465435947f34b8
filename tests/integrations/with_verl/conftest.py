"""Tests that need verl: not collected where it is absent."""

import importlib.util
import os

import pytest

HAS_VERL = importlib.util.find_spec("verl") is not None
collect_ignore_glob = [] if HAS_VERL else ["test_*.py"]
OURS = "fused_sd|integrations|test_|conftest"
# Two of Ray's clusters that start together on a small machine may miss Ray's limit of 30 seconds.
START_RAY = (
    "test_main_ppo",
    "test_ray",
    "test_teacher_group",
    "test_trainer",
    "test_vision_trainer",
)
# Ray gives way to every other process, and would starve beside the other tests.
os.environ["RAY_worker_niceness"] = "0"  # noqa: SIM112, its spelling


def pytest_configure(config: pytest.Config) -> None:
    if HAS_VERL:  # only warnings that this project's own lines cause are errors
        config.addinivalue_line("filterwarnings", f"ignore:::(?!{OURS})")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Keep each file in one process, and all files that start Ray in the same one."""
    for item in items:
        group = "ray" if item.path.stem in START_RAY else item.path.stem
        item.add_marker(pytest.mark.xdist_group(group))


@pytest.fixture(scope="session", autouse=True)
def losses_registered() -> None:
    """Register the losses, as the entry point does if fused_sd is installed."""
    from fused_sd.integrations.verl import plugin

    plugin.register_losses()
