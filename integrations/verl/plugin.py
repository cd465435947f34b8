"""The entry point that verl imports: importing this module registers what fused_sd has for verl.

verl drops whatever an entry point raises, so nothing is raised here: what came of each part is kept
in ``STATUS`` and, where it is a failure, logged as a warning.

Engines and trainers are registered where ``VERL_ENGINE_VENDOR=fused_sd`` asks for them, as it must
for verl to choose the engines: verl's own, which they extend, take seconds to import, and not every
process needs them.
"""

import importlib
import importlib.util
import logging
import os
from collections.abc import Sequence
from typing import Any

from fused_sd.checks import fail
from fused_sd.integrations.verl import RLSD_LOSS, TOPK_LOSS, VENDOR, versions

REGISTERED = "registered"
NOT_ASKED_FOR = f"not asked for: set VERL_ENGINE_VENDOR={VENDOR} where verl is imported"
NO_MEGATRON = "Megatron-Core is not installed"

STATUS: dict[str, str] = {}
"""What came of each part: REGISTERED, NOT_ASKED_FOR, NO_MEGATRON or why it failed."""

ENGINES = {
    # part: module, class, verl's backends
    "fsdp": ("teachers", "TeachingEngine", ["fsdp", "fsdp2"]),
    "megatron": ("megatron_engine", "FusedSDMegatronEngine", ["megatron"]),
}

_PACKAGE = "fused_sd.integrations.verl"
_logger = logging.getLogger(__name__)


def register() -> None:
    """Register every part that is wanted here; what fails is recorded, not raised."""
    attempt("losses")
    for part in (*ENGINES, "trainer"):
        if part == "megatron" and importlib.util.find_spec("megatron") is None:
            STATUS[part] = NO_MEGATRON
        elif os.environ.get("VERL_ENGINE_VENDOR") == VENDOR:
            attempt(part)
        else:
            STATUS.setdefault(part, NOT_ASKED_FOR)


def attempt(part: str) -> None:
    """Register a part of ``STATUS``; record and log what fails."""
    try:
        if part == "losses":
            register_losses()
        elif part == "trainer":
            register_trainer()
        else:
            register_engine(part)
    except Exception as error:  # verl would drop it, so it is told here
        STATUS[part] = f"failed: {type(error).__name__}: {error}"
        _logger.warning("fused_sd is not registered with verl (%s): %s", part, error)


def register_losses() -> None:
    """Put the losses into verl's registry of distillation losses, once.

    Raises:
        ValueError: the verl that is installed is not supported, or a name is another plugin's.
    """
    _check_version()
    from verl.trainer.distillation import losses as registry

    losses = importlib.import_module(f"{_PACKAGE}.losses")
    wanted = {
        TOPK_LOSS: (losses.topk_loss, {"use_topk": True}),
        RLSD_LOSS: (losses.rlsd_loss, {"use_estimator": True}),
    }
    known = registry.DISTILLATION_LOSS_REGISTRY
    missing = [name for name in wanted if not _is_ours(f"loss_mode {name!r}", known.get(name))]
    for name in missing:  # only after every name was found free
        function, kind = wanted[name]
        settings = registry.DistillationLossSettings(names=[name], **kind)
        registry.register_distillation_loss(settings)(function)
    STATUS["losses"] = REGISTERED


def register_engine(part: str, devices: Sequence[str] = ("cuda",)) -> None:
    """Put an engine into verl's registry under the vendor ``fused_sd``, once.

    Args:
        part: a key of ``ENGINES``.
        devices: verl's names of the devices it is to run on.

    Raises:
        ValueError: the verl that is installed is not supported, or the key is another plugin's.
        ImportError: what the engine extends is not installed.
    """
    _check_version()
    module, name, backends = ENGINES[part]
    engine = getattr(importlib.import_module(f"{_PACKAGE}.{module}"), name)
    from verl.workers.engine import EngineRegistry

    known: dict[str, Any] = EngineRegistry._engines.get("language_model", {})
    keys = [(backend, (device, VENDOR)) for backend in backends for device in devices]
    missing = [
        (backend, key)
        for backend, key in keys
        if not _is_ours(f"engine {backend} {key}", known.get(backend, {}).get(key))
    ]
    for backend, (device, vendor) in missing:
        EngineRegistry.register("language_model", backend, device, vendor)(engine)
    STATUS[part] = REGISTERED


def register_trainer() -> None:
    """Put the trainers of self-distillation into verl's registry, once.

    Raises:
        ValueError: the verl that is installed is not supported, or a name is another plugin's.
        ImportError: what verl's trainer needs is not installed.
    """
    _check_version()
    importlib.import_module(f"{_PACKAGE}.trainer").register()
    STATUS["trainer"] = REGISTERED


def _check_version() -> None:
    import verl

    reason = versions.why_not(verl.__version__)
    if reason is not None:
        raise ValueError(reason)


def _is_ours(what: str, holder: Any) -> bool:
    """Whether an entry is there already; False where it is free."""
    if holder is None:
        return False
    if not holder.__module__.startswith(f"{_PACKAGE}."):
        fail(
            what,
            "be free in verl's registry",
            f"{holder.__module__}.{holder.__qualname__}",
            "leave that plugin out: VERL_USE_EXTERNAL_PLUGINS names those to load",
        )
    return True


register()
