"""What the tests of this folder share."""

import pytest
from gpu_layout import gpu_layout


@pytest.fixture
def gemms(monkeypatch):
    """A GPU's layout on a CPU, and how many GEMMs of each kind have run."""
    return gpu_layout(monkeypatch)
