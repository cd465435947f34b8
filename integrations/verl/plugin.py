"""The entry point that verl imports: importing this module registers losses, engines and trainers.

verl only imports an entry point, and logs at DEBUG level whatever that raises.  So registration is
a side effect of the import, and nothing is raised: ``STATUS`` keeps the outcome of each part, and a
failure is logged as a warning.

Engines and trainers are registered only if ``VERL_ENGINE_VENDOR`` is ``fused_sd``.  verl would not
choose our engines otherwise, and the verl modules that they extend take seconds to import, in every
process that imports verl.  ``engines`` registers the engines alone, and needs no variable.

verl looks an engine up under (device, vendor) and falls back to the device alone.  Engines are
registered under a vendor of their own because verl accepts no new backend name
(``FSDPEngineConfig.strategy`` is checked) and refuses a key that is taken.
"""

import importlib
import importlib.util
import logging
import os
from collections.abc import Sequence
from typing import Any

from fused_sd.checks import fail
from fused_sd.integrations.verl import RLSD_LOSS, TOPK_LOSS, VENDOR, seams, versions

REGISTERED = "registered"
NOT_ASKED_FOR = f"not asked for: set VERL_ENGINE_VENDOR={VENDOR} where verl is imported"
NO_MEGATRON = "Megatron-Core is not installed"

STATUS: dict[str, str] = {}
"""The outcome of each part: REGISTERED, NOT_ASKED_FOR, NO_MEGATRON or the reason of a failure."""

ENGINES = {
    # part: module, class, verl's backends
    "fsdp": ("teachers", "TeachingEngine", ["fsdp", "fsdp2"]),
    "megatron": ("megatron_engine", "FusedSDMegatronEngine", ["megatron"]),
}

_PACKAGE = "fused_sd.integrations.verl"
_logger = logging.getLogger(__name__)


def register() -> None:
    """Register every part that is wanted in this process; record failures instead of raising."""
    try_to_register("losses")
    for part in (*ENGINES, "trainer"):
        if part == "megatron" and importlib.util.find_spec("megatron") is None:
            STATUS[part] = NO_MEGATRON
        elif os.environ.get("VERL_ENGINE_VENDOR") == VENDOR:
            try_to_register(part)
        else:
            STATUS.setdefault(part, NOT_ASKED_FOR)


def try_to_register(part: str) -> None:
    """Register one part; record and log a failure in ``STATUS``."""
    try:
        if part == "losses":
            register_losses()
        elif part == "trainer":
            register_trainer()
        else:
            register_engine(part)
    except Exception as error:  # verl would drop it without a word
        STATUS[part] = f"failed: {type(error).__name__}: {error}"
        _logger.warning("fused_sd is not registered with verl (%s): %s", part, error)


def register_losses() -> None:
    """Put the losses into verl's registry of distillation losses, once.

    Raises:
        ValueError: the installed verl is not supported, or another plugin has a name of ours.
    """
    _check_verl("losses")
    from verl.trainer.distillation import losses as registry

    losses = importlib.import_module(f"{_PACKAGE}.losses")
    wanted = {
        TOPK_LOSS: (losses.topk_loss, {"use_topk": True}),
        RLSD_LOSS: (losses.rlsd_loss, {"use_estimator": True}),
    }
    known = registry.DISTILLATION_LOSS_REGISTRY
    missing = [name for name in wanted if not _is_ours(f"loss_mode {name!r}", known.get(name))]
    for name in missing:  # after all names were found free, so that a clash registers none
        function, kind = wanted[name]
        settings = registry.DistillationLossSettings(names=[name], **kind)
        registry.register_distillation_loss(settings)(function)
    STATUS["losses"] = REGISTERED


def register_engine(part: str, devices: Sequence[str] = ("cuda",), vendor: str = VENDOR) -> None:
    """Put an engine into verl's registry under a vendor, once.

    Args:
        part: a key of ``ENGINES``.
        devices: verl's names of the devices that the engine is registered for.
        vendor: ``"fused_sd"``, which a variable asks for, or a name of verl's, see ``engines``.

    Raises:
        ValueError: the installed verl is not supported, or another plugin has the key.
        ImportError: what the engine extends is not installed.
    """
    _check_verl(part)
    module, name, backends = ENGINES[part]
    engine = getattr(importlib.import_module(f"{_PACKAGE}.{module}"), name)
    from verl.workers.engine import EngineRegistry

    known: dict[str, Any] = EngineRegistry._engines.get("language_model", {})
    keys = [(backend, (device, vendor)) for backend in backends for device in devices]
    missing = [
        (backend, key)
        for backend, key in keys
        if not _is_ours(f"engine {backend} {key}", known.get(backend, {}).get(key))
    ]
    for backend, (device, _) in missing:
        EngineRegistry.register("language_model", backend, device, vendor)(engine)
    STATUS[part] = REGISTERED


def register_trainer() -> None:
    """Put the trainers of self-distillation into verl's registry, once.

    Raises:
        ValueError: the installed verl is not supported, or another plugin has a name of ours.
        ImportError: something that verl's trainer needs is not installed.
    """
    _check_verl("trainer")
    importlib.import_module(f"{_PACKAGE}.trainer").register()
    STATUS["trainer"] = REGISTERED


def _check_verl(part: str) -> None:
    """Refuse a verl whose version is not supported, or that lacks what the part needs."""
    import verl

    reason = versions.unsupported_reason(verl.__version__)
    if reason is not None:
        raise ValueError(reason)
    seams.check(part)


def _is_ours(what: str, holder: Any) -> bool:
    """Whether a registry's entry is already ours; False if it is free.

    Raises:
        ValueError: the entry is another plugin's.
    """
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
