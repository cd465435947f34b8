"""The tests' own ground: every module collects on a machine that lacks the optional packages."""

import pathlib
import subprocess
import sys
import warnings

import pytest
import torch
from waits import no_waits

ROOT = pathlib.Path(__file__).parent.parent
OPTIONAL = (
    *("accelerate", "datasets", "gguf", "hypothesis", "liger_kernel", "matplotlib", "megatron"),
    *("peft", "pytest_benchmark", "rich", "trl", "verl"),
)


def test_every_module_collects_without_the_optional_packages():
    """A GPU machine may have PyTorch, Triton, transformers and pytest, and no way to get more."""
    script = (
        "import sys, pytest\n"
        "class Hidden:\n"
        "    def pytest_configure(self):\n"
        f"        sys.modules.update(dict.fromkeys({OPTIONAL}))\n"
        "options = '--collect-only -q -p no:hypothesispytest -p no:benchmark'.split()\n"
        "sys.exit(pytest.main(options, plugins=[Hidden()]))\n"
    )
    run = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-2000:]
    assert "tests/kernels/test_gpu.py::" in run.stdout


def test_the_list_for_a_gpu_is_whole():
    """It names every file that has a marked test, and a test that may run on a GPU is marked."""
    listed = (ROOT / "tests" / "gpu.txt").read_text().splitlines()[2:]
    for path in set((ROOT / "tests").rglob("test_*.py")) - {pathlib.Path(__file__)}:
        text = path.read_text()
        if '"cuda" if torch.cuda.is_available()' in text:
            assert "pytest.mark.kernels" in text, path
        if "pytest.mark.gpu" in text or "pytest.mark.kernels" in text:
            assert any(path.is_relative_to(ROOT / name) for name in listed), path


def test_a_wait_that_fails_leaves_later_tests_alone(monkeypatch):
    """PyTorch warns after it has set the mode, and the tests turn warnings into errors."""
    mode = []

    def set_mode(new):
        mode.append(new)
        warnings.warn("Synchronization debug mode is a prototype feature", stacklevel=1)

    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", set_mode)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    with pytest.raises(RuntimeError, match="a wait"), no_waits():
        raise RuntimeError("a wait")
    assert mode == ["error", "default"]
