"""A report on whether fused_sd works inside the installed verl, and if not, why.

verl itself is silent about a plugin that failed to load, about a plugin that it was told to leave
out, and about which engine it chose.  The report is what this process sees: Ray's workers also get
the variables of ``ray_kwargs.ray_init.runtime_env``, where the recipes set theirs.
"""

import importlib
import os
import sys
import traceback
from importlib.metadata import EntryPoint, entry_points
from typing import Any, NamedTuple
from unittest import mock

from fused_sd.integrations.verl import (
    RLSD_LOSS,
    SUPPORTED_VERL,
    TOPK_LOSS,
    VENDOR,
    seams,
    versions,
)

GROUP, PLUGIN = "verl.plugins", "fused_sd.integrations.verl.plugin"
DISTRIBUTIONS = ("torch", "transformers", "tensordict", "ray", "megatron-core")
STRATEGIES = ("fsdp", "fsdp2", "megatron")
TRAINING = ("verl.workers.engine_workers", "verl.trainer.main_ppo", "verl.trainer.ppo.v1")
UNDECLARED = "verl imports it without requiring it: pip install 'verl[verl-core]' has all of these"


class Finding(NamedTuple):
    """One line of the report; what is untried is no problem, and not known to work either."""

    name: str
    value: str
    problem: bool = False
    untried: bool = False


Section = tuple[str, list[Finding]]


def doctor() -> int:
    """Print the report; return 1 if it holds a problem, else 0."""
    loaded_by_verl = PLUGIN in sys.modules
    sections = [("versions", _versions())]
    if not any(finding.problem for _, findings in sections for finding in findings):
        imports = ("imports", [_imported(name) for name in TRAINING])
        # before the plugin is loaded here, if verl did not: its engines would be found then
        engines = ("engine that runs", _engines())
        sections += [
            imports,
            ("plugins", _plugins(loaded_by_verl)),
            ("environment", _environment()),
            ("parts of fused_sd", _parts(loaded_by_verl)),
            engines,
        ]
    return _print(sections)


def _print(sections: list[Section]) -> int:
    problems = untried = 0
    for title, findings in sections:
        print(title)
        for finding in findings:
            mark = "!" if finding.problem else "?" if finding.untried else " "
            print(f"  {mark} {finding.name:<28} {finding.value}")
            problems += finding.problem
            untried += finding.untried
    said = [f"{problems} problem{'' if problems == 1 else 's'}, marked !"] if problems else []
    said += [f"{untried} not tried, marked ?"] if untried else []
    print("; ".join(said) or "all well")
    return 1 if problems else 0


def _versions() -> list[Finding]:
    import fused_sd

    others = [Finding(name, versions.installed(name) or "not installed") for name in DISTRIBUTIONS]
    return [Finding("fused_sd", fused_sd.__version__), _verl(), *others]


def _verl() -> Finding:
    try:
        verl = importlib.import_module("verl")
    except Exception as error:
        if versions.installed("verl") is None and _is_missing(error, "verl"):
            return Finding("verl", str(versions.unsupported_reason(None)), True)
        return Finding("verl", _failure(error), True)
    known, commit = verl.__version__, versions.commit_of(verl)
    where = f"{f'commit {commit[:9]} ' if commit else ''}in {os.path.dirname(str(verl.__file__))}"
    reason = versions.unsupported_reason(known)
    if reason is not None:
        return Finding("verl", f"{reason} ({where})", True)
    untried = versions.untried_reason(known, commit)
    if untried is not None:
        return Finding("verl", f"{known} ({where}); {untried}", untried=True)
    supported = "tried" if versions.is_development(known) else f"supported: {SUPPORTED_VERL}"
    return Finding("verl", f"{known} ({supported}; {where})")


def _imported(module: str) -> Finding:
    try:
        importlib.import_module(module)
    except Exception as error:
        return Finding(module, _failure(error), True)
    return Finding(module, "works")


def _failure(error: Exception) -> str:
    """Say why an import failed, and what provides a module that verl does not declare."""
    is_theirs = isinstance(error, ModuleNotFoundError) and not _is_missing(error, "fused_sd")
    remedy = f"; {UNDECLARED}" if is_theirs and not _is_missing(error, "verl") else ""
    return f"fails: {_last_line(error)}{remedy}"


def _is_missing(error: Exception, package: str) -> bool:
    """Whether the error says that a package or a module of it is not there."""
    name = str(error.name) if isinstance(error, ModuleNotFoundError) else ""
    return name.split(".")[0] == package


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
    meanings = {"auto": "every plugin is loaded", "none": "no plugin is loaded"}
    policy_means = meanings.get(policy.strip().lower(), "these plugins are loaded, by name")
    return [
        Finding("VERL_USE_EXTERNAL_PLUGINS", f"{policy}: {policy_means}"),
        _vendor(os.environ.get("VERL_ENGINE_VENDOR")),
        _device(os.environ.get("VERL_ENGINE_DEVICE")),
    ]


def _vendor(vendor: str | None) -> Finding:
    name = "VERL_ENGINE_VENDOR"
    if vendor == VENDOR:
        return Finding(name, f"{vendor}: fused_sd's engines run")
    needs = f"{TOPK_LOSS} and impl_backend={VENDOR} need {VENDOR}, {RLSD_LOSS} does not"
    if not vendor:
        return Finding(name, f"not set: verl's engines run; {needs} (the recipes set it for Ray)")
    is_known = any(isinstance(key, tuple) and key[1] == vendor for key in _engine_keys())
    if is_known or vendor in _platforms():
        return Finding(name, f"{vendor}: its engines run, or verl's; {needs}")
    return Finding(
        name, f"{vendor}: nobody registered engines for it, so verl's run; {needs}", True
    )


def _device(device: str | None) -> Finding:
    name = "VERL_ENGINE_DEVICE"
    if not device:
        found = _device_name()
        means = f"the engine for this machine's device runs, {found}"
        if found == "cpu":
            means = "there is no GPU here; reported as on a machine with one"
        return Finding(name, f"not set: {means}")
    devices = sorted({key if isinstance(key, str) else key[0] for key in _engine_keys()})
    if device not in devices:
        return Finding(name, f"{device}: no engine, verl has some for {', '.join(devices)}", True)
    ours = sorted({key[0] for key in _engine_keys() if isinstance(key, tuple) and key[1] == VENDOR})
    where = f"fused_sd's are registered for {', '.join(ours) or 'none'}"
    return Finding(name, f"{device}: the engine for {device} runs; {where}")


def _engine_keys() -> set[str | tuple[str, str]]:
    """Return the keys of verl's registry of engines: devices, or devices and vendors."""
    from verl.workers.engine import EngineRegistry

    backends: Any = EngineRegistry._engines.get("language_model", {})
    return {key for engines in backends.values() for key in engines}


def _platforms() -> set[str]:
    """Return verl's names of hardware vendors, for which its own engines run."""
    from verl.plugin.platform import PlatformRegistry

    return set(PlatformRegistry.registered_names())


def _parts(loaded_by_verl: bool) -> list[Finding]:
    """Report the outcome of each part; try those that nothing asked for as well."""
    plugin = importlib.import_module(PLUGIN)
    findings = []
    for part, status in plugin.STATUS.items():
        if status == plugin.NOT_ASKED_FOR:
            plugin.try_to_register(part)
        if plugin.STATUS[part] == plugin.REGISTERED:
            number = len(seams.names(part))
            status = f"works, {status}" if status == plugin.NOT_ASKED_FOR else status
            status = status if loaded_by_verl else "works, once verl loads the plugin"
            findings.append(Finding(part, f"{status} (all {number} seams found in verl)"))
        else:
            status = plugin.STATUS[part]
            findings.append(Finding(part, status, status != plugin.NO_MEGATRON))
    if plugin.STATUS.get("megatron") == plugin.REGISTERED:
        findings += _megatron_core()
    return [*findings, *_losses()]


def _megatron_core() -> list[Finding]:
    """Report what Megatron-Core lacks; no problem, as verl's path with logits does not need it."""
    engine = importlib.import_module("fused_sd.integrations.verl.megatron_engine")
    reason = engine.missing_feature()
    return [] if reason is None else [Finding("megatron, fused", f"off: {reason}")]


def _losses() -> list[Finding]:
    from verl.trainer.distillation.losses import DISTILLATION_LOSS_REGISTRY as known

    holders = {name: known[name].__module__ for name in (TOPK_LOSS, RLSD_LOSS) if name in known}
    return [Finding(f"loss_mode={name}", holder) for name, holder in holders.items()]


def _engines() -> list[Finding]:
    """Report the engine class that verl chooses for each strategy on the training device."""
    try:
        from verl.workers.engine import EngineRegistry
    except Exception as error:
        return [Finding("any", _failure(error), True)]

    asked_for = os.environ.get("VERL_ENGINE_VENDOR") == VENDOR
    findings = []
    found = _device_name()
    device = os.environ.get("VERL_ENGINE_DEVICE") or ("cuda" if found == "cpu" else found)
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


def _device_name() -> str:
    """Return verl's name of this machine's device."""
    from verl.utils.device import get_device_name

    return str(get_device_name())
