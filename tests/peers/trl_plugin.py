"""A pytest plugin for TRL's own tests: our trainers in place of TRL's, and what they train on.

FUSED_SD_MODE      a distillation_mode for every configuration that has one
"""

import functools
import importlib
import math
import os
from types import ModuleType
from typing import Any

import pytest
import torch
import transformers
from recording import SCALE, SWAPPED, watch

# package of the stock class: our class
SWAPS = {
    "trl.experimental.sdpo": "FusedSDPOTrainer",
    "trl.experimental.sdft": "FusedSDFTTrainer",
    "trl.experimental.gkd": "FusedGKDTrainer",
    "trl": "FusedGRPOTrainer",
}
# values of a clock or of the process
UNSTABLE = ("runtime", "per_second", "time", "memory", "mem_")


def pytest_configure() -> None:
    _answer_for_other_versions()
    _leave_models_without_triton()
    _record_logs()
    _record_gradients()
    _set_arguments(os.environ.get("FUSED_SD_MODE", ""))
    _count_logits()
    _count_fused()
    _put_trainers()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    transformers.set_seed(0)


def _answer_for_other_versions() -> None:
    """Let tests of another version ask for packages that the installed TRL does not know."""
    known = importlib.import_module("trl.import_utils")

    def missing(name: str) -> Any:
        if name.startswith("is_") and name.endswith("_available"):
            return lambda: False
        raise AttributeError(name)

    known.__getattr__ = missing


def _leave_models_without_triton() -> None:
    """Without a GPU, use_liger_kernel means Liger's loss alone, which is PyTorch.

    It would also replace norms by Triton kernels: in their classes, and so in all later tests.
    """
    if not torch.cuda.is_available():
        trainer = importlib.import_module("transformers.trainer")
        trainer.apply_liger_kernel = lambda model, config: None


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
        watch.logged.append(kept)
        stock(self, logs, *args, **kwargs)

    transformers.Trainer.log = log


def _record_gradients() -> None:
    """Record the norm of the gradient after each backward: a right loss may have a wrong one."""
    stock = transformers.Trainer.training_step

    def training_step(self: Any, model: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        loss = stock(self, model, *args, **kwargs)
        norms = [p.grad.float().norm() for p in model.parameters() if p.grad is not None]
        if norms:
            _record("gradient", torch.stack(norms).norm())
        return loss

    transformers.Trainer.training_step = training_step


def _record_losses(cls: type) -> None:
    """Record what compute_loss returns, in training, in evaluation and to a test that calls it."""
    stock = cls.compute_loss

    @functools.wraps(stock)
    def compute_loss(self: Any, *args: Any, **kwargs: Any) -> Any:
        outer = not vars(self).get("_is_recorded", False)
        self._is_recorded = True
        try:
            found = stock(self, *args, **kwargs)
        finally:
            if outer:
                self._is_recorded = False
        if outer:
            _record("compute_loss", found[0] if isinstance(found, tuple) else found)
        return found

    cls.compute_loss = compute_loss


def _record(name: str, value: Any) -> None:
    value = float(value)
    watch.logged.append({name: value} if math.isfinite(value) else {})


def _set_arguments(mode: str) -> None:
    """Make trainings in which rounding stays rounding.

    fp32 hides no wrong loss, and AdamW would make a whole step of a gradient that is 0 but for
    rounding.
    """
    stock = transformers.TrainingArguments.__post_init__

    def post_init(self: Any) -> None:
        self.bf16 = False
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
            watch.counts["logits"] += 1

    torch.nn.modules.module.register_module_forward_hook(hook)


def _count_fused() -> None:
    from fused_sd.integrations import transformers as adapter
    from fused_sd.integrations.trl import swaps

    stock = adapter.answer

    def answer(*args: Any, **kwargs: Any) -> Any:
        watch.ours += 1
        return stock(*args, **kwargs)

    adapter.answer = answer
    # what runs once, before training: a few tokens' logits are compared with the model's own
    _uncounted(adapter, "_check_once")
    _uncounted(swaps, "shift_by_padding")


def _uncounted(module: ModuleType, name: str) -> None:
    stock = getattr(module, name)

    def run(*args: Any, **kwargs: Any) -> Any:
        before = watch.counts["logits"]
        found = stock(*args, **kwargs)
        watch.counts["logits"] = before
        return found

    setattr(module, name, run)


def _put_trainers() -> None:
    from fused_sd.integrations import trl as ours

    for package, name in SWAPS.items():
        module, stock = importlib.import_module(package), name.removeprefix("Fused")
        cls = getattr(module, stock)
        if SWAPPED:
            cls = getattr(ours, name)
            if SCALE != 1:
                cls = _scaled(cls, SCALE)
            setattr(module, stock, cls)
        _record_losses(cls)


def _scaled(cls: type, scale: float) -> type:
    """Return a trainer that is wrong: all of its losses are multiplied by a factor."""

    def compute_loss(self: Any, *args: Any, **kwargs: Any) -> Any:
        return scale * super(wrong, self).compute_loss(*args, **kwargs)

    wrong = type(cls.__name__, (cls,), {"compute_loss": compute_loss})
    return wrong
