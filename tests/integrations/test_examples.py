"""The example scripts run as they are, on a tiny model."""

import pathlib
import runpy
import sys

import pytest

for _package in ("trl", "peft", "datasets", "accelerate"):
    pytest.importorskip(_package)

from method_pairs import model
from trl_pairs import TOKENIZER

FOLDER = pathlib.Path(__file__).parents[2] / "integrations" / "examples"
TESTED_ELSEWHERE = ("sd_zero_phase1", "verl_arithmetic")
SCRIPTS = sorted(
    path.stem
    for path in FOLDER.glob("*.py")
    if 'if __name__ == "__main__"' in path.read_text() and path.stem not in TESTED_ELSEWHERE
)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A tiny model with its tokenizer on disk."""
    folder = tmp_path_factory.mktemp("model")
    model().float().save_pretrained(folder)
    TOKENIZER.save_pretrained(folder)
    return folder


def arguments(name, home, out):
    common = ["--model", str(home), "--output_dir", str(out), "--bf16", "false", "--use_cpu"]
    size = ["--per_device_train_batch_size", "4", "--num_generations", "4"]
    length = ["--max_completion_length", "4", "--report_to", "none"]
    if name == "discovery":
        return [*common, *size, *length, "--num_questions", "1", "--max_attempts", "8"]
    return [*common, *size, *length, "--num_questions", "8", "--max_steps", "1"]


@pytest.mark.parametrize("name", SCRIPTS)
def test_an_example_runs(name, home, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", [name, *arguments(name, home, tmp_path)])
    runpy.run_module(f"fused_sd.integrations.examples.{name}", run_name="__main__")
    assert list(tmp_path.glob("**/*.safetensors"))
