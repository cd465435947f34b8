"""A pytest plugin for TRL's own tests: our trainers in place of TRL's, and what each test logged.

FUSED_SD_SWAP      "1": the classes of SWAPS replace TRL's before any test module is imported
FUSED_SD_RECORD    the file that gets a line of JSON for each test
FUSED_SD_MODE      a distillation_mode for every configuration that has one
FUSED_SD_SCALE     a factor on every loss of ours: a comparison that does not see 1.02 is worthless
"""

import importlib
import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import transformers

# package of the stock class: our class
SWAPS = {
    "trl.experimental.sdpo": "FusedSDPOTrainer",
    "trl.experimental.sdft": "FusedSDFTTrainer",
    "trl.experimental.gkd": "FusedGKDTrainer",
    "trl": "FusedGRPOTrainer",
}
# values of a clock or of the process
UNSTABLE = ("runtime", "per_second", "time", "memory", "mem_")


class Watch:
    """What happens in one test: logged values, fused calls and forwards that made logits."""

    def __init__(self) -> None:
        self.logged: list[dict[str, float]] = []
        self.fused = self.logits = 0


_now = Watch()


def pytest_configure(config: pytest.Config) -> None:
    _answer_for_other_versions()
    _record_logs()
    _set_arguments(os.environ.get("FUSED_SD_MODE", ""))
    _count_logits()
    _count_fused()
    if os.environ.get("FUSED_SD_SWAP") == "1":
        _swap(float(os.environ.get("FUSED_SD_SCALE", "1")))


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    global _now
    _now = Watch()
    transformers.set_seed(0)
    yield


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.when != "call" and report.outcome == "passed":
        return
    line = {"test": report.nodeid, "outcome": report.outcome, **vars(_now)}
    if report.outcome == "failed":
        line["why"] = str(report.longrepr).splitlines()[-1][:200]
    elif report.outcome == "skipped":
        line["why"] = str(report.longrepr[-1])[:200]
    with Path(os.environ["FUSED_SD_RECORD"]).open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def _answer_for_other_versions() -> None:
    """Let tests of another version ask for packages that the installed TRL does not know."""
    known = importlib.import_module("trl.import_utils")

    def missing(name: str) -> Any:
        if name.startswith("is_") and name.endswith("_available"):
            return lambda: False
        raise AttributeError(name)

    known.__getattr__ = missing


def _record_logs() -> None:
    stock = transformers.Trainer.log

    def log(self: Any, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        kept = {
            name: float(value)
            for name, value in logs.items()
            if isinstance(value, int | float)
            and math.isfinite(value)
            and not any(word in name for word in UNSTABLE)
        }
        _now.logged.append(kept)
        stock(self, logs, *args, **kwargs)

    transformers.Trainer.log = log


def _set_arguments(mode: str) -> None:
    """Log every step of trainings in which rounding stays rounding.

    fp32 hides no wrong loss, and AdamW would make a whole step of a gradient that is 0 but for
    rounding.
    """
    stock = transformers.TrainingArguments.__post_init__

    def post_init(self: Any) -> None:
        self.bf16 = False
        self.logging_steps = 1
        self.optim = "sgd"
        if mode and hasattr(self, "distillation_mode"):
            self.distillation_mode = mode
            self.distillation_topk = 20 if mode == "topk_logits" else None
            if mode == "sampled_token":
                self.distillation_alpha = 1.0  # the only divergence that it can estimate
        stock(self)

    transformers.TrainingArguments.__post_init__ = post_init


def _count_logits() -> None:
    """Count projections of more than one position onto a vocabulary, of models that train."""

    def hook(module: torch.nn.Module, _: Any, output: Any) -> None:
        head = isinstance(module, torch.nn.Linear) and module.out_features >= 256
        head = head and isinstance(output, torch.Tensor)
        if head and output.dim() == 3 and output.size(1) > 1:
            _now.logits += 1

    torch.nn.modules.module.register_module_forward_hook(hook)


def _count_fused() -> None:
    from fused_sd.integrations import transformers as adapter
    from fused_sd.integrations.trl import swaps

    stock = adapter.answer

    def answer(*args: Any, **kwargs: Any) -> Any:
        _now.fused += 1
        return stock(*args, **kwargs)

    adapter.answer = answer
    # what runs once, before training: a few tokens' logits are compared with the model's own
    _uncounted(adapter, "_check_once")
    _uncounted(swaps, "shift_by_padding")


def _uncounted(module: ModuleType, name: str) -> None:
    stock = getattr(module, name)

    def run(*args: Any, **kwargs: Any) -> Any:
        before = _now.logits
        found = stock(*args, **kwargs)
        _now.logits = before
        return found

    setattr(module, name, run)


def _swap(scale: float) -> None:
    from fused_sd.integrations import trl as ours

    for package, name in SWAPS.items():
        cls = getattr(ours, name)
        if scale != 1:
            cls = _scaled(cls, scale)
        setattr(importlib.import_module(package), name.removeprefix("Fused"), cls)


def _scaled(cls: type, scale: float) -> type:
    """Return a trainer that is wrong: all of its losses are multiplied by a factor."""

    def compute_loss(self: Any, *args: Any, **kwargs: Any) -> Any:
        return scale * super(wrong, self).compute_loss(*args, **kwargs)

    wrong = type(cls.__name__, (cls,), {"compute_loss": compute_loss})
    return wrong
