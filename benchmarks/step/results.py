"""What is on disk: the findings of all processes, and the tables made of them."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.methods.storage import commit
from benchmarks.step.plan import Settings
from benchmarks.step.report import markdown
from fused_sd import checks
from fused_sd.measuring.environment import environment

RESULTS, TABLES = "step.json", "step.md"


class Results:
    """One document, whole on disk after every finding.

    Args:
        folder: where it is.
        settings: of what is going to be added.
        resume: keep what is there.
        at_commit: of a copy without its history; None: the checkout's.

    Raises:
        ValueError: what was to be kept was measured with other settings, or elsewhere.
    """

    def __init__(
        self, folder: Path, settings: Settings, *, resume: bool, at_commit: str | None = None
    ) -> None:
        self.folder = folder
        where = environment() | {"commit": at_commit or commit()}
        new = {"settings": asdict(settings), "environment": where, "lanes": {}}
        self.document: dict[str, Any] = json.loads(json.dumps(new))  # as it is read back
        path = folder / RESULTS
        if resume and path.exists():
            kept = json.loads(path.read_text(encoding="utf-8"))
            for kind in ("settings", "environment"):
                differing = _differing(kept[kind], self.document[kind])
                if differing:
                    checks.fail(
                        "--resume",
                        f"find results of the same {kind} in {path}",
                        f"another {', '.join(differing)}",
                        "leave it out to measure everything again, or name another --out",
                    )
            self.document = kept

    @property
    def lanes(self) -> dict[str, Any]:
        lanes: dict[str, Any] = self.document["lanes"]
        return lanes

    def add(self, name: str, finding: dict[str, Any]) -> None:
        """Keep it and write everything; a kill leaves the old files or the new ones."""
        lane = self.lanes.setdefault(name, {"cells": {}})
        for earlier in ("failed", "left_out"):
            lane.pop(earlier, None)
        if "cell" in finding:
            cell = finding["cell"]
            lane["cells"][str(cell["tokens"])] = cell
        else:
            lane.update(finding)
        self.folder.mkdir(parents=True, exist_ok=True)
        _write(self.folder / RESULTS, json.dumps(self.document, indent=1) + "\n")
        _write(self.folder / TABLES, markdown(self.document))
        print(f"  {name} {json.dumps(finding)}", flush=True)


def _differing(kept: dict[str, Any], new: dict[str, Any]) -> list[str]:
    return sorted(name for name in kept.keys() | new.keys() if kept.get(name) != new.get(name))


def _write(path: Path, text: str) -> None:
    draft = path.with_suffix(".draft")
    draft.write_text(text, encoding="utf-8")
    draft.replace(path)
