"""Where the manual's Python runs: a folder with a tiny model, and configurations cut down.

Longer runs are cut short: questions, completions, steps and batches are few, and a reward that a
random model could never earn is drawn by lot.
"""

import random

import pytest

ON_CPU = {"use_cpu": True, "bf16": False}
SMALL = {
    "report_to": [],
    "save_strategy": "no",
    "logging_steps": 1,
    "disable_tqdm": True,
    "max_steps": 1,
    "per_device_train_batch_size": 4,
}
ROLLOUTS = {"max_completion_length": 6}


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A folder to run in, with a tiny model and its tokenizer; sizes are cut down."""
    for package in ("trl", "peft", "datasets"):
        pytest.importorskip(package)
    from method_pairs import model
    from transformers import TrainingArguments
    from trl_pairs import TOKENIZER

    from fused_sd.integrations.examples import arithmetic
    from fused_sd.integrations.trl.config import SelfDistillationConfig
    from fused_sd.integrations.trl.srt_config import SRTConfig

    folder = tmp_path / "model"
    model().float().save_pretrained(folder)
    TOKENIZER.save_pretrained(folder)
    monkeypatch.chdir(tmp_path)

    def cut(config, settings):
        check = config.__post_init__

        def smaller(self):
            for name, value in settings.items():
                setattr(self, name, value)
            if getattr(self, "num_generations", 1) > 1:
                self.num_generations = 4
            check(self)

        monkeypatch.setattr(config, "__post_init__", smaller)

    cut(TrainingArguments, ON_CPU)
    cut(SelfDistillationConfig, {**SMALL, **ROLLOUTS})
    cut(SRTConfig, SMALL)
    lots, questions = random.Random(0), arithmetic.questions
    monkeypatch.setattr(arithmetic, "questions", lambda num: questions(min(num, 8)))
    monkeypatch.setattr(
        arithmetic,
        "reward",
        lambda completions, **_: [float(lots.random() < 0.5) for _ in completions],
    )
    return folder
