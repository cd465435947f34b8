"""The batches that one process runs, and the findings that it reports."""

import tempfile
import time
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import torch
import transformers

from benchmarks.step import models
from benchmarks.step.agreement import NUM_TOKENS, Agreement, compare
from benchmarks.step.batch import make_batch
from benchmarks.step.loop import Batch, Step, StepLoop, release
from benchmarks.step.plan import Job, step_seconds
from benchmarks.step.providers import PROVIDERS
from benchmarks.step.search import Bracket, longest
from benchmarks.step.sizes import SIZES
from benchmarks.step.trainers import BUILDERS, Setup
from fused_sd.bench.measure import quantile
from fused_sd.demo.memory import Peak

Say = Callable[[dict[str, Any]], None]
KEPT_BYTES = 2**28  # more than this held after running out of memory would spoil the search


def measure(job: Job, say: Say) -> None:
    """Run a job and report each finding through ``say``."""
    transformers.logging.set_verbosity_error()
    settings, provider = job.settings, PROVIDERS[job.provider]
    schedule = Schedule(job, say, base=Peak(settings.device).held_now())
    dtype = getattr(torch, settings.dtype)
    model = models.random_model(SIZES[job.model], settings.device, dtype)
    with tempfile.TemporaryDirectory() as folder:
        setup = Setup(model, models.tokenizer(), Path(folder), settings.device, dtype)
        trainer = BUILDERS[provider.name](setup)

        def inspect(model: Any, batch: Batch, loss: torch.Tensor) -> None:
            schedule.agreement = compare(trainer, model, batch, loss, provider)

        StepLoop(trainer, schedule.run(), settings.device, inspect).run()


class Schedule:
    """The steps of a job: one to compare, some at every length, then the search.

    Args:
        job: The job.
        say: Called with each finding.
        base: Bytes that the process held before it built the model.
    """

    agreement: Agreement  # set by ``inspect`` after the first backward

    def __init__(self, job: Job, say: Say, base: int) -> None:
        self.job, self.settings, self.say, self.base = job, job.settings, say, base
        self.size = SIZES[job.model]
        self.started = time.perf_counter()
        self.pace = 1.0  # measured over estimated seconds
        self.kept_bytes = 0

    def run(self) -> Generator[Batch, Step, None]:
        yield self.batch(NUM_TOKENS)  # to compare; it also allocates the optimizer's state
        found = self.agreement
        self.say({"agreement": found._asdict()})
        if not found.agrees:
            self.say({"wrong": f"loss and gradient must be within {found.bounds} of float64's"})
            return
        known = Bracket(self.job.fits, self.job.fails, False)
        for length in self.job.lengths:
            if known.fails is None and not self.has_time(length, 1 + self.settings.steps):
                return
            cell = yield from self.cell(length, known.fails)
            self.say({"cell": cell})
            if cell["outcome"] == "measured":
                known = known._replace(fits=length)
            elif known.fails is None:
                known = known._replace(fails=length)
        if self.settings.longest_cap:
            known = yield from self.search(known)
            self.say({"longest": known._asdict()})

    def cell(self, length: int, fails: int | None) -> Generator[Batch, Step, dict[str, Any]]:
        """Measure time and memory at one length; lengths come in ascending order."""
        if fails is not None:
            return {
                "tokens": length,
                "outcome": "out of memory",
                "reason": f"{fails} tokens do not fit",
            }
        release(self.settings.device)
        batch, steps = self.batch(length), []
        for _ in range(1 + self.settings.steps):
            steps.append((yield batch))
            if not self.fits(steps[-1]):
                return {"tokens": length, "outcome": "out of memory"}
        timed = steps[1:]
        self.pace = timed[-1].seconds / step_seconds(self.size, length, self.settings)
        return {
            "tokens": length,
            "outcome": "measured",
            "rows": batch["completion_ids"].size(0),
            "seconds": _quantiles([step.seconds for step in timed]),
            "held_bytes": timed[0].held_bytes - self.base,
            "peak_bytes": max(step.peak_bytes for step in timed) - self.base,
        }

    def search(self, known: Bracket) -> Generator[Batch, Step, Bracket]:
        """Search the longest response, with one step for each length that is tried."""
        probe = longest(
            known,
            first=self.settings.lengths[0],
            cap=self.settings.longest_cap,
            precision=self.settings.precision,
            may_try=lambda length: self.kept_bytes <= KEPT_BYTES and self.has_time(length, 1),
        )
        answer: bool | None = None
        while True:
            try:
                length = next(probe) if answer is None else probe.send(answer)
            except StopIteration as end:
                found: Bracket = end.value
                return found
            release(self.settings.device)
            step = yield self.batch(length)
            self.kept_bytes = step.kept_bytes
            answer = self.fits(step)

    def fits(self, step: Step) -> bool:
        limit = self.settings.memory_limit
        return not step.out_of_memory and (limit is None or step.peak_bytes - self.base <= limit)

    def has_time(self, length: int, num_steps: int) -> bool:
        if self.job.seconds is None:
            return True
        expected = num_steps * self.pace * step_seconds(self.size, length, self.settings)
        return time.perf_counter() - self.started + expected <= self.job.seconds

    def batch(self, length: int) -> Batch:
        settings = self.settings
        return make_batch(length, settings.row_tokens, self.size.vocab, settings.device)


def _quantiles(values: list[float]) -> dict[str, float]:
    return {f"p{percent}": quantile(values, percent / 100) for percent in (20, 50, 80)}
