"""The results file: one lane for each pair of model and provider."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks.step.plan import Settings
from benchmarks.storage import Document, stamp


class Results(Document):
    """``step.json``, written again after every finding.

    Args:
        folder: Where the file is.
        settings: The settings of the jobs that will be added.
        resume: Continue the file that exists.
        at_commit: The commit of a copy without its git history; None: read it from the checkout.

    Raises:
        ValueError: The existing file has other settings, or another device, version or commit.
    """

    def __init__(
        self, folder: Path, settings: Settings, *, resume: bool, at_commit: str | None = None
    ) -> None:
        environment = stamp(torch.device(settings.device), at_commit)
        empty = {"settings": asdict(settings), "environment": environment, "lanes": {}}
        fixed = ("settings", "environment")
        super().__init__(folder / "step.json", empty, fixed=fixed, resume=resume)

    @property
    def lanes(self) -> dict[str, Any]:
        lanes: dict[str, Any] = self.values["lanes"]
        return lanes

    def add(self, name: str, finding: dict[str, Any]) -> None:
        """Store and print a finding of a job, and write the file."""
        lane = self.lanes.setdefault(name, {"cells": {}})
        for earlier in ("failed", "left_out"):
            lane.pop(earlier, None)
        if "cell" in finding:
            cell = finding["cell"]
            lane["cells"][str(cell["tokens"])] = cell
        else:
            lane.update(finding)
        self.write()
        print(f"  {name} {json.dumps(finding)}", flush=True)
