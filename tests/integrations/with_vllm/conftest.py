"""Tests that run vLLM on a CPU: not collected where it is absent."""

import importlib.util
import os

import pytest

HAS_VLLM = importlib.util.find_spec("vllm") is not None
collect_ignore_glob = [] if HAS_VLLM else ["test_*.py"]
OURS = "fused_sd|integrations|test_|conftest"

if HAS_VLLM:
    # Read when vLLM is imported.  The engine runs in this process, so that TRL can load weights
    # into it; a cache of 1 GiB is enough; nothing is compiled.
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_USE_AOT_COMPILE", "0")
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")


def pytest_configure(config: pytest.Config) -> None:
    if HAS_VLLM:  # only warnings that this project's own lines cause are errors
        config.addinivalue_line("filterwarnings", f"ignore:::(?!{OURS})")
