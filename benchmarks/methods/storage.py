"""Finished parts on disk, and what is said of the machine that made them."""

import json
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

from fused_sd.measuring.environment import default_device, device_name, installed

PACKAGES = ("torch", "transformers", "trl", "peft")
ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "methods"


class Parts:
    """A folder with a JSON file for each finished part.

    A part is identified by its name and by everything that decides it: one that was made from
    other settings counts as missing.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def load(self, name: str, decided_by: dict[str, Any]) -> Any | None:
        """The part's values; None where it is not finished, or is another's."""
        try:
            kept = json.loads(self._path(name).read_text(encoding="utf-8"))
        except (FileNotFoundError, json.JSONDecodeError):
            return None
        return kept["values"] if kept["decided_by"] == _plain(decided_by) else None

    def save(self, name: str, decided_by: dict[str, Any], values: Any) -> None:
        """Keep a finished part; a kill leaves the old file or the new one, never half of one."""
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self._path(name)
        draft = path.with_suffix(f".{os.getpid()}")
        kept = {"decided_by": _plain(decided_by), "values": values}
        draft.write_text(json.dumps(kept), encoding="utf-8")
        draft.replace(path)

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.json"


def _plain(values: dict[str, Any]) -> Any:
    """As JSON gives it back."""
    return json.loads(json.dumps(values, sort_keys=True, default=str))


def environment() -> dict[str, str]:
    """Machine, versions and commit."""
    facts = {name: installed(name) for name in PACKAGES}
    return {
        "device": device_name(default_device()),
        "python": platform.python_version(),
        **facts,
        "threads": str(torch.get_num_threads()),
        "commit": commit(),
    }


def commit() -> str:
    """The checkout's commit, marked where files of the library were changed since."""
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
