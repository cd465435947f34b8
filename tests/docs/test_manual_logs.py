"""Every name that a trainer logs is on the manual's page of logs, and some on its method's."""

import pytest
from manual import DOCS, code

for _package in ("trl", "peft", "datasets"):
    pytest.importorskip(_package)

import torch
from method_pairs import METHODS, make, model
from trl_pairs import TOKENIZER

from fused_sd.integrations.trl import SRTConfig, SRTTrainer, Trace

PREFIX = "self_distillation/"
VARIANTS = {
    **{method: (method, {}) for method in METHODS},
    "sparse": ("OPSD", {"gradient": "sparse"}),
    "thoughts": ("RLSD", {"thought_only": True}),
    "trained twice": ("SDPO", {"num_iterations": 2}),
}
PAGES = {
    "SDPO": "sdpo",
    "SDZero": "sd_zero",
    "GRPO": "baselines",
    "RFT": "baselines",
    "IWOPD": "iw_opd",
}


@pytest.mark.parametrize("name", VARIANTS)
def test_what_is_logged_is_explained(name, tmp_path):
    method, settings = VARIANTS[name]
    trainer = make(method, tmp_path, student=model(torch.float32), **settings)
    trainer.train()
    keys = {key for logs in trainer.state.log_history for key in logs if key.startswith(PREFIX)}
    logged = {key.removeprefix(PREFIX) for key in keys}
    assert {"loss", "skipped_steps", "active_token_fraction"} <= logged
    assert logged <= set(code((DOCS / "guides" / "metrics.md").read_text()))
    page = DOCS / "methods" / f"{PAGES.get(method, method.lower())}.md"
    watched = page.read_text().partition("## What to watch")[2].partition("\n## ")[0]
    assert logged & set(code(watched))


def test_what_phase_1_of_sd_zero_logs_is_explained(tmp_path):
    traces = [Trace(0, "?", (5, 6), (7,), "!", (8,), (9, 10), False, 0.0, 1.0)]
    quiet = {"report_to": "none", "save_strategy": "no", "use_cpu": True, "bf16": False}
    args = SRTConfig(str(tmp_path), num_train_epochs=1, logging_steps=1, **quiet)
    trainer = SRTTrainer(model(torch.float32), args, traces, processing_class=TOKENIZER)
    trainer.train()
    logged = trainer.state.log_history[0]
    own = {"generation_loss", "revision_loss", "corrected_fraction", "num_tokens"}
    assert own <= set(logged)
    trls = {"loss", "grad_norm", "learning_rate", "epoch", "step", "step_time"}
    assert set(logged) - own <= trls
    assert own <= set(code((DOCS / "guides" / "metrics.md").read_text()))
