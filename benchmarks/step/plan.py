"""The jobs that are to be measured, their order, and estimates of their time."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from benchmarks.step import batch
from benchmarks.step.providers import PROVIDERS
from benchmarks.step.sizes import SIZES, Size

# rough rates for planning alone: bf16 training on a large GPU, and one CPU core
FLOPS = {"cuda": 350e12, "cpu": 25e9}
STARTUP_SECONDS = {"cuda": 15.0, "cpu": 12.0}  # imports, weights, trainer, comparison
STEP_SECONDS = {"cuda": 0.15, "cpu": 0.1}  # a step of few tokens
FORWARDS = 5  # student, recomputation, backward (as long as two forwards), teacher


@dataclass(frozen=True)
class Settings:
    """Everything that decides the numbers; one file holds results of one ``Settings`` only.

    Attributes:
        device: "cpu" or "cuda".
        dtype: "bfloat16" or "float32", the weights' type.
        lengths: Response tokens of a batch, ascending.
        steps: Timed steps for each length, after one step that is not timed.
        row_tokens: The longest response; batches with more tokens have more rows.
        longest_cap: The largest length that the search for the longest batch tries; 0: no search.
        precision: The search's relative precision.
        memory_limit: Bytes that a step may hold, weights included; None: the device's memory.
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
        model: A key of ``SIZES``.
        provider: A key of ``PROVIDERS``.
        settings: The settings of the whole run.
        lengths: The lengths that are still to be measured.
        fits: The longest length that is known to fit; 0: none is.
        fails: The shortest length that is known not to fit; None: none is.
        seconds: The time that the job may take; None: no limit.
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
    """Return the jobs that ``known``, the lanes of an earlier run, does not hold.

    Providers of one objective on one model follow each other, so that a run that is cut short
    still has pairs to compare.
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
    """Return the unfinished part of a lane, or None if the lane is finished."""
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
    """Estimate the time of one step with this many response tokens."""
    rows, length = batch.shape(num_tokens, settings.row_tokens)
    width = length + batch.PROMPT_TOKENS
    backbone = 2 * size.backbone_parameters * width
    # the causal mask halves the two GEMMs of scores and values
    attention = 2 * size.layers * size.heads * size.head_dim * width**2
    head = 2 * size.vocab * size.hidden * length
    flops = rows * FORWARDS * (backbone + attention + head)
    return STEP_SECONDS[settings.device] + flops / FLOPS[settings.device]


def job_seconds(job: Job) -> float:
    """Estimate a job's time if every length fits into memory."""
    size, settings = SIZES[job.model], job.settings
    timed = sum(step_seconds(size, n, settings) for n in job.lengths) * (1 + settings.steps)
    # lengths double: all tries together take twice as long as the last
    search = 2 * step_seconds(size, settings.longest_cap, settings) if settings.longest_cap else 0.0
    return STARTUP_SECONDS[settings.device] + timed + search


def least_seconds(job: Job) -> float:
    """Estimate the time up to the first length's result; a job with less time is not started."""
    first = (job.lengths or job.settings.lengths)[0]
    step = step_seconds(SIZES[job.model], first, job.settings)
    return STARTUP_SECONDS[job.settings.device] + step * (1 + job.settings.steps)
