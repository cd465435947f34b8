"""A report on whether fused_sd works inside the installed verl, and if not, why.

verl itself is silent about a plugin that failed to load, about a plugin that it was told to leave
out, and about which engine it chose.
"""

import importlib
import os
import sys
import traceback
from importlib.metadata import EntryPoint, entry_points
from typing import NamedTuple
from unittest import mock

from fused_sd.integrations.verl import RLSD_LOSS, SUPPORTED_VERL, TOPK_LOSS, VENDOR, versions

GROUP, PLUGIN = "verl.plugins", "fused_sd.integrations.verl.plugin"
DISTRIBUTIONS = ("torch", "transformers", "tensordict", "ray", "megatron-core")
STRATEGIES = ("fsdp", "fsdp2", "megatron")
# verl's package does not declare everything that these modules import
TRAINING = ("verl.workers.engine_workers", "verl.trainer.main_ppo")


class Finding(NamedTuple):
    """One line of the report."""

    name: str
    value: str
    problem: bool = False


Section = tuple[str, list[Finding]]


def doctor() -> int:
    """Print the report; return 1 if it holds a problem, else 0."""
    loaded_by_verl = PLUGIN in sys.modules
    sections = [("versions", _versions())]
    if "verl" in sys.modules:
        sections += [
            ("imports", [_imported(name) for name in TRAINING]),
            ("plugins", _plugins(loaded_by_verl)),
            ("environment", _environment()),
            ("registered", _registered()),
            ("engine that runs", _engines()),
        ]
    return _print(sections)


def _print(sections: list[Section]) -> int:
    problems = 0
    for title, findings in sections:
        print(title)
        for name, value, problem in findings:
            print(f"  {'!' if problem else ' '} {name:<28} {value}")
            problems += problem
    print(f"{problems} problem{'' if problems == 1 else 's'}, marked !" if problems else "all well")
    return 1 if problems else 0


def _versions() -> list[Finding]:
    import fused_sd

    others = [Finding(name, versions.installed(name) or "not installed") for name in DISTRIBUTIONS]
    return [Finding("fused_sd", fused_sd.__version__), _verl(), *others]


def _verl() -> Finding:
    try:
        known = importlib.import_module("verl").__version__
    except Exception as error:
        if versions.installed("verl") is not None:
            return Finding("verl", f"fails: {_last_line(error)}", True)
        known = None
    reason = versions.unsupported_reason(known)
    return Finding("verl", reason or f"{known} (supported: {SUPPORTED_VERL})", reason is not None)


def _imported(module: str) -> Finding:
    try:
        importlib.import_module(module)
    except Exception as error:
        return Finding(module, f"fails: {_last_line(error)}", True)
    return Finding(module, "works")


def _plugins(loaded_by_verl: bool) -> list[Finding]:
    """Load every plugin of verl's, and tell whether verl itself had loaded ours."""
    found = list(entry_points(group=GROUP))
    findings = [_loaded(point) for point in found]
    if not any(point.value == PLUGIN for point in found):
        remedy = "pip install fused_sd, or set VERL_USE_EXTERNAL_MODULES=" + PLUGIN
        findings.append(Finding("fused_sd", f"no entry point; {remedy}", not loaded_by_verl))
    elif not loaded_by_verl:
        remedy = "VERL_USE_EXTERNAL_PLUGINS must be auto, or name fused_sd"
        findings.append(Finding("fused_sd", f"not loaded by verl; {remedy}", True))
    return findings


def _loaded(point: EntryPoint) -> Finding:
    try:
        point.load()
    except Exception as error:
        return Finding(point.name, f"{point.value} fails: {_last_line(error)}", True)
    return Finding(point.name, f"{point.value} loads")


def _last_line(error: Exception) -> str:
    """Return the last line of a traceback: the exception's type and message."""
    return traceback.format_exception_only(error)[-1].strip()


def _environment() -> list[Finding]:
    """Report the environment variables that verl reads, and what their values mean."""
    policy = os.environ.get("VERL_USE_EXTERNAL_PLUGINS", "auto")
    vendor, device = os.environ.get("VERL_ENGINE_VENDOR"), os.environ.get("VERL_ENGINE_DEVICE")
    meanings = {"auto": "every plugin is loaded", "none": "no plugin is loaded"}
    policy_means = meanings.get(policy.strip().lower(), "these plugins are loaded, by name")
    needs = f"{TOPK_LOSS} and impl_backend={VENDOR} need {VENDOR}, {RLSD_LOSS} does not"
    vendor_means = "fused_sd's engines run" if vendor == VENDOR else f"verl's engines run; {needs}"
    return [
        Finding("VERL_USE_EXTERNAL_PLUGINS", f"{policy}: {policy_means}"),
        Finding("VERL_ENGINE_VENDOR", f"{vendor or 'not set'}: {vendor_means}"),
        Finding("VERL_ENGINE_DEVICE", f"{device or 'not set'}: {_device_means(device)}"),
    ]


def _device_means(device: str | None) -> str:
    if device is None:
        return f"the engine for this machine's device runs, {_device()}"
    if device == "cuda":
        return "the engine for GPUs runs"
    return f"the engine for {device} runs; fused_sd's are registered for cuda"


def _registered() -> list[Finding]:
    """Report the outcome of each part; try those that nothing asked for as well."""
    plugin = importlib.import_module(PLUGIN)
    findings = []
    for part, status in plugin.STATUS.items():
        if status == plugin.NOT_ASKED_FOR:
            plugin.try_to_register(part)
            if plugin.STATUS[part] == plugin.REGISTERED:
                findings.append(Finding(part, f"works, {status}"))
                continue
            status = plugin.STATUS[part]
        fine = status in (plugin.REGISTERED, plugin.NO_MEGATRON)
        findings.append(Finding(part, status, not fine))
    if plugin.STATUS.get("megatron") == plugin.REGISTERED:
        findings += _megatron_core()
    return [*findings, *_losses()]


def _megatron_core() -> list[Finding]:
    """Report what Megatron-Core lacks; no problem, as verl's path with logits does not need it."""
    engine = importlib.import_module("fused_sd.integrations.verl.megatron_engine")
    reason = engine.missing_feature()
    return [] if reason is None else [Finding("fused Megatron", reason)]


def _losses() -> list[Finding]:
    from verl.trainer.distillation.losses import DISTILLATION_LOSS_REGISTRY as known

    holders = {name: known[name].__module__ for name in (TOPK_LOSS, RLSD_LOSS) if name in known}
    return [Finding(f"loss_mode={name}", holder) for name, holder in holders.items()]


def _engines() -> list[Finding]:
    """Report the engine class that verl chooses for each strategy on the training device."""
    from verl.workers.engine import EngineRegistry

    asked_for = os.environ.get("VERL_ENGINE_VENDOR") == VENDOR
    findings = []
    device = os.environ.get("VERL_ENGINE_DEVICE") or _device()
    with mock.patch.dict(os.environ, VERL_ENGINE_DEVICE=device):  # where verl reads it
        for strategy in STRATEGIES:
            try:
                engine = EngineRegistry.get_engine_cls("language_model", strategy)
            except (AssertionError, ValueError) as error:
                findings.append(Finding(strategy, f"none: {error}"))
                continue
            name = f"{engine.__module__}.{engine.__qualname__}"
            ours = engine.__module__.startswith("fused_sd.")
            findings.append(Finding(strategy, name, asked_for and not ours))
    return findings


def _device() -> str:
    """Return verl's name of the training device; a machine with CPUs alone counts as a GPU's."""
    from verl.utils.device import get_device_name

    name = get_device_name()
    return "cuda" if name == "cpu" else name
