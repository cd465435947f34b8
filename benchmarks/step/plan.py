"""What is to be measured, in which order, and about how long it takes."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from benchmarks.step import batch
from benchmarks.step.providers import PROVIDERS
from benchmarks.step.sizes import SIZES, Size

# rough, for planning alone: what bf16 training reaches on a large GPU, and one CPU core
FLOPS = {"cuda": 350e12, "cpu": 25e9}
STARTUP_SECONDS = {"cuda": 15.0, "cpu": 12.0}  # imports, weights, trainer, the compared batch
STEP_SECONDS = {"cuda": 0.15, "cpu": 0.1}  # what a step of few tokens takes
FORWARDS = 5  # student, its recomputation, its backward (twice a forward) and the teacher's


@dataclass(frozen=True)
class Settings:
    """What decides the numbers: results of other settings are not mixed with these.

    Attributes:
        lengths: response tokens of a batch, ascending.
        steps: timed for each length, after one that is not.
        row_tokens: the longest response; longer batches have more rows.
        longest_cap: how far the longest response is searched; 0: not at all.
        precision: of that search, as a share.
        memory_limit: bytes that a step may hold, weights included; None: what the device has.
    """

    device: str
    dtype: str
    lengths: tuple[int, ...]
    steps: int
    row_tokens: int
    longest_cap: int
    precision: float
    memory_limit: int | None


@dataclass(frozen=True)
class Job:
    """One process: a provider on a model, at every length that is still to be measured.

    Attributes:
        lengths: a part of the settings' where others are known.
        fits, fails: the longest that is known to, and the shortest; 0 and None: nothing is known.
        seconds: left for it; None: as long as it takes.
    """

    model: str
    provider: str
    settings: Settings
    lengths: tuple[int, ...]
    fits: int = 0
    fails: int | None = None
    seconds: float | None = None

    @property
    def name(self) -> str:
        return f"{self.model}/{self.provider}"

    def within(self, seconds: float | None) -> "Job":
        return replace(self, seconds=seconds)

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "Job":
        values = json.loads(text)
        settings = values.pop("settings")
        settings["lengths"] = tuple(settings["lengths"])
        return cls(
            **{**values, "lengths": tuple(values["lengths"]), "settings": Settings(**settings)}
        )


def jobs(
    models: Sequence[str], providers: Sequence[str], settings: Settings, known: dict[str, Any]
) -> list[Job]:
    """What is not in ``known``, the lanes of an earlier run.

    Objective by objective, model by model: whom we compare comes one after the other.
    """
    objectives = dict.fromkeys(PROVIDERS[name].objective for name in providers)
    planned = [
        _job(model, name, settings, known.get(f"{model}/{name}", {}))
        for objective in objectives
        for model in models
        for name in providers
        if PROVIDERS[name].objective == objective
    ]
    return [job for job in planned if job is not None]


def _job(model: str, provider: str, settings: Settings, lane: dict[str, Any]) -> Job | None:
    """What is left of a lane; None: nothing."""
    cells = lane.get("cells", {})
    missing = tuple(n for n in settings.lengths if str(n) not in cells)
    searched = not settings.longest_cap or lane.get("longest", {}).get("complete", False)
    if "wrong" in lane or (searched and not missing):
        return None
    by_outcome = {
        outcome: [cell["tokens"] for cell in cells.values() if cell["outcome"] == outcome]
        for outcome in ("measured", "out of memory")
    }
    fits = max(by_outcome["measured"], default=0)
    fails = min(by_outcome["out of memory"], default=None)
    return Job(model, provider, settings, missing, fits, fails)


def step_seconds(size: Size, num_tokens: int, settings: Settings) -> float:
    """About how long one step of a number of response tokens takes."""
    rows, length = batch.shape(num_tokens, settings.row_tokens)
    width = length + batch.PROMPT_TOKENS
    backbone = 2 * size.backbone_parameters * width
    # scores and values, half of them masked
    attention = 2 * size.layers * size.heads * size.head_dim * width**2
    head = 2 * size.vocab * size.hidden * length
    flops = rows * FORWARDS * (backbone + attention + head)
    return STEP_SECONDS[settings.device] + flops / FLOPS[settings.device]


def job_seconds(job: Job) -> float:
    """About how long a process takes if everything fits."""
    size, settings = SIZES[job.model], job.settings
    timed = sum(step_seconds(size, n, settings) for n in job.lengths) * (1 + settings.steps)
    # the doublings cost twice the last of them
    search = 2 * step_seconds(size, settings.longest_cap, settings) if settings.longest_cap else 0.0
    return STARTUP_SECONDS[settings.device] + timed + search


def least_seconds(job: Job) -> float:
    """About how long the first of its lengths takes: with less there is no use in starting."""
    first = (job.lengths or job.settings.lengths)[0]
    step = step_seconds(SIZES[job.model], first, job.settings)
    return STARTUP_SECONDS[job.settings.device] + step * (1 + job.settings.steps)
