"""What every test runs under: a seed, and Triton's interpreter where there is no GPU."""

import os
import tempfile
from contextlib import suppress

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
for _name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE"):
    os.environ.setdefault(_name, "1")

import pytest
import torch

# Inductor keeps what it compiled, and would take it again under another ATEN_CPU_CAPABILITY, for
# which its vectors have the wrong width.
_cache = f"torchinductor_{os.getuid()}_{torch.backends.cpu.get_cpu_capability()}"
os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", os.path.join(tempfile.gettempdir(), _cache))

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is defined

from interpreter import compute_as_a_gpu

# Drawn inputs are the same on every machine.  --hypothesis-profile=default draws others.
with suppress(ImportError):
    from hypothesis import settings

    settings.register_profile("repeatable", derandomize=True)
    settings.load_profile("repeatable")

torch.set_num_threads(int(os.environ.get("FUSED_SD_TEST_THREADS", "1")))
if not torch.cuda.is_available():
    compute_as_a_gpu()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        absent = pytest.mark.skip(reason="no GPU here")
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(absent)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def poisoned_memory():
    """Fresh tensors hold NaN until they are written, and order-dependent operations are errors."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)
