"""A suite's results on disk: one document, whole after every cell.

benchmarks/results/<device>/<suite>.json, or <suite>-<part>.json where a part was measured later.
"""

import json
import os
import re
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.methods.storage import ROOT, commit
from fused_sd import checks
from fused_sd.bench.providers import PROVIDERS
from fused_sd.measuring.environment import device_name, driver_version, environment, installed

RESULTS = ROOT / "benchmarks" / "results"


def file_slug(device: str) -> str:
    """A device's name as that of a file or a folder, whatever its number of threads."""
    return re.sub(r"[^a-z0-9]+", "-", device.split(",")[0].lower()).strip("-")


def stamp(device: torch.device, at_commit: str | None) -> dict[str, str]:
    """Everything that a number depends on beside its cell.

    Args:
        at_commit: of a copy without its history; None: the checkout's.
    """
    packages = sorted({provider.package for provider in PROVIDERS if provider.package})
    facts = environment() | {name: installed(name) for name in packages}
    if device.type == "cuda":
        facts["driver"] = driver_version()
    return facts | {"device": device_name(device), "commit": at_commit or commit()}


class Store:
    """The document of a suite.

    Args:
        folder: its device's.
        resume: keep the cells that are there.

    Raises:
        ValueError: the cells to be kept were measured elsewhere, or by another version.
    """

    def __init__(self, folder: Path, suite: str, environment: dict[str, str], resume: bool) -> None:
        self.path = folder / f"{suite}.json"
        self.document: dict[str, Any] = {"suite": suite, "environment": environment, "parts": {}}
        if resume and self.path.exists():
            kept = json.loads(self.path.read_text(encoding="utf-8"))
            differing = sorted(
                name
                for name in kept["environment"].keys() | environment.keys()
                if kept["environment"].get(name) != environment.get(name)
            )
            if differing:
                checks.fail(
                    "--resume",
                    f"find results of this environment in {self.path}",
                    f"another {', '.join(differing)}",
                    "leave it out to measure everything again, or name another --out",
                )
            self.document = kept

    def has(self, part: str, key: str) -> bool:
        return key in self.document["parts"].get(part, {})

    def add(self, part: str, key: str, values: dict[str, Any]) -> None:
        """Keep a cell; a kill leaves the old document or the new one, never half of one."""
        cell = values | {"date": time.strftime("%Y-%m-%d %H:%M:%S %z")}
        self.document["parts"].setdefault(part, {})[key] = cell
        self.path.parent.mkdir(parents=True, exist_ok=True)
        draft = self.path.with_suffix(f".{os.getpid()}")
        draft.write_text(json.dumps(self.document, indent=1) + "\n", encoding="utf-8")
        draft.replace(self.path)


def stored(folder: Path = RESULTS) -> list[dict[str, Any]]:
    """Every suite's document, those of GPUs first."""
    return [*_read(folder, "*/gpu*.json"), *_read(folder, "*/cpu*.json")]


def stored_steps(folder: Path = RESULTS) -> list[dict[str, Any]]:
    """The documents of ``benchmarks.step``."""
    return _read(folder, "*/step.json")


def _read(folder: Path, pattern: str) -> list[dict[str, Any]]:
    return [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob(pattern))]
