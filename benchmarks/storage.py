"""Results on disk, with the machine, the versions and the commit that they belong to.

benchmarks/results/<device>/<suite>.json    cells of ``benchmarks.run``
benchmarks/results/<device>/step.json       training steps of ``benchmarks.step``
benchmarks/results/{methods,sparse}/        experiments, whatever the device
"""

import json
import os
import re
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from fused_sd import checks
from fused_sd.bench.providers import PROVIDERS
from fused_sd.measuring.environment import device_name, driver_version, environment, installed

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"


def file_slug(device: str) -> str:
    """Return a device's name in the form of a file name, without its number of threads."""
    return re.sub(r"[^a-z0-9]+", "-", device.split(",")[0].lower()).strip("-")


def stamp(device: torch.device, at_commit: str | None = None) -> dict[str, str]:
    """Return the versions, the device and the commit that results are stored with.

    Args:
        device: The device that is measured.
        at_commit: The commit of a copy without its git history; None: read it from the checkout.
    """
    packages = sorted({provider.package for provider in PROVIDERS if provider.package})
    facts = environment() | {name: installed(name) for name in packages}
    if device.type == "cuda":
        facts["driver"] = driver_version()
    return facts | {"device": device_name(device), "commit": at_commit or commit()}


def commit() -> str:
    """Return the checkout's commit, marked where files of the library differ from it."""
    try:
        head = _git("rev-parse", "--short", "HEAD")
        changed = _git("status", "--porcelain", "--", "fused_sd", "integrations", "kernels")
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return f"{head}, changed" if changed else head


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(ROOT), *arguments]
    run = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    return run.stdout.strip()


def write_whole(path: Path, text: str) -> None:
    """Replace a file in one step: a process that is killed leaves the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_suffix(f".{os.getpid()}")
    draft.write_text(text, encoding="utf-8")
    draft.replace(path)


class Document:
    """A JSON file that grows while a benchmark runs.

    Args:
        path: The file.
        empty: The document before anything is measured.
        fixed: Names of the parts of ``empty`` that decide the numbers.
        resume: Continue the file that exists.

    Raises:
        ValueError: The existing file differs from ``empty`` in a ``fixed`` part.
    """

    def __init__(
        self, path: Path, empty: dict[str, Any], *, fixed: Sequence[str], resume: bool
    ) -> None:
        self.path = path
        self.values: dict[str, Any] = json.loads(json.dumps(empty))  # as it will be read back
        if not resume or not path.exists():
            return
        kept = json.loads(path.read_text(encoding="utf-8"))
        for part in fixed:
            old, new = kept[part], self.values[part]
            differing = sorted(n for n in old.keys() | new.keys() if old.get(n) != new.get(n))
            if differing:
                checks.fail(
                    "--resume",
                    f"find results of the same {part} in {path}",
                    f"another {', '.join(differing)}",
                    "leave it out to measure everything again, or name another --out",
                )
        self.values = kept

    def write(self) -> None:
        write_whole(self.path, json.dumps(self.values, indent=1) + "\n")


class SuiteResults(Document):
    """The measured cells of a suite, by part and by the cell's key.

    Args:
        folder: The device's folder.
        name: The file's name without its ending.
        environment: What ``stamp`` returned.
        resume: Continue the file that exists.

    Raises:
        ValueError: The existing file belongs to another device, version or commit.
    """

    def __init__(self, folder: Path, name: str, environment: dict[str, str], resume: bool) -> None:
        empty = {"suite": name, "environment": environment, "parts": {}, "lost": {}}
        super().__init__(folder / f"{name}.json", empty, fixed=("environment",), resume=resume)

    @property
    def lost(self) -> dict[str, str]:
        """Providers that lost the device, with what was measured and said then."""
        found: dict[str, str] = self.values.setdefault("lost", {})
        return found

    def has(self, part: str, key: str) -> bool:
        return key in self.values["parts"].get(part, {})

    def add(self, part: str, key: str, cell: dict[str, Any]) -> None:
        """Store a cell with its date, and write the file."""
        dated = cell | {"date": time.strftime("%Y-%m-%d %H:%M:%S %z")}
        self.values["parts"].setdefault(part, {})[key] = dated
        self.write()


class Parts:
    """A folder with one JSON file for each finished part of an experiment.

    A file also holds every setting that decided its part; with other settings it counts as missing.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def load(self, name: str, decided_by: dict[str, Any]) -> Any | None:
        """Return the part's values; None if it is unfinished or was made with other settings."""
        try:
            kept = json.loads(self._path(name).read_text(encoding="utf-8"))
        except (FileNotFoundError, json.JSONDecodeError):
            return None
        return kept["values"] if kept["decided_by"] == _plain(decided_by) else None

    def save(self, name: str, decided_by: dict[str, Any], values: Any) -> None:
        kept = {"decided_by": _plain(decided_by), "values": values}
        write_whole(self._path(name), json.dumps(kept))

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.json"


def _plain(values: dict[str, Any]) -> Any:
    """Return the values as JSON gives them back."""
    return json.loads(json.dumps(values, sort_keys=True, default=str))


def suite_documents(folder: Path = RESULTS) -> list[dict[str, Any]]:
    """Return the results of every suite, those of GPUs first."""
    return [*_read(folder, "*/gpu*.json"), *_read(folder, "*/cpu*.json")]


def step_documents(folder: Path = RESULTS) -> list[dict[str, Any]]:
    """Return the results of ``benchmarks.step``."""
    return _read(folder, "*/step.json")


def _read(folder: Path, pattern: str) -> list[dict[str, Any]]:
    return [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob(pattern))]
