"""The parts of an experiment, and making the missing ones in one process or several."""

import dataclasses
import os
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from benchmarks.methods import settings
from benchmarks.methods.settings import Scale
from benchmarks.methods.task import Task
from benchmarks.running import say
from benchmarks.storage import Parts

PLANTED, DISCOVERY = "planted", "discovery"


@dataclass(frozen=True)
class Part:
    """One measurement: a method's training with one seed, planted errors, or discovery.

    Attributes:
        task: "tiny" or "smollm2".
        method: A key of ``settings.METHODS``, ``PLANTED`` or ``DISCOVERY``.
        rate: The learning rate.
        seed: The seed of the training and of the tiny base model.
        scale: The size of the training.
        questions: The part of the task's questions that is evaluated.
    """

    task: str
    method: str
    rate: float
    seed: int
    scale: Scale
    questions: str = "held_out"

    @property
    def name(self) -> str:
        """The name of the part's file."""
        words = (self.task, self.method, self.seed, self.scale.steps)
        return "-".join(map(str, (*words, f"{self.rate:g}", self.questions)))

    @property
    def decided_by(self) -> dict[str, Any]:
        """Every setting that decides the part's values."""
        method = settings.METHODS.get(self.method)
        if method is None:
            return {**dataclasses.asdict(self), "settings": dataclasses.asdict(self.search)}
        return {
            **dataclasses.asdict(self),
            "trainer": method.trainer,
            "settings": settings.method_settings(self.task, self.method),
        }

    @property
    def search(self) -> settings.Discovery:
        """The size of the discovery experiment."""
        return settings.QUICK_DISCOVERY if self.scale == settings.QUICK else settings.Discovery()


def make_task(name: str) -> Task:
    """Return the task that a model is trained on."""
    if name == "tiny":
        from benchmarks.methods.arithmetic import addition

        return addition()
    from benchmarks.methods.plurals import plurals

    return plurals()


def measure(part: Part, cache: Path) -> Any:
    """Make one part and return its values."""
    task = make_task(part.task)
    if part.method == PLANTED:
        from benchmarks.methods.planted import NUM_QUESTIONS, score

        return score(task, part.seed, cache, part.scale.num_questions or NUM_QUESTIONS)
    if part.method == DISCOVERY:
        from benchmarks.methods.discovery import compare

        return compare(task, part.rate, part.seed, part.search, cache)
    from benchmarks.methods.train import run

    return run(task, part.method, part.rate, part.seed, part.scale, cache, part=part.questions)


def make(
    parts: Sequence[Part], kept: Parts, cache: Path, *, jobs: int, resume: bool
) -> dict[Part, Any]:
    """Make the missing parts; return the values of all parts in the order of ``parts``.

    Args:
        parts: The parts.
        kept: The folder of finished parts.
        cache: The folder of the base models.
        jobs: The number of processes, with one thread each.
        resume: Take finished parts from ``kept``; otherwise every part is made anew.
    """
    done = {part: kept.load(part.name, part.decided_by) for part in parts} if resume else {}
    missing = [part for part in parts if done.get(part) is None]
    if resume and len(missing) < len(parts):
        say(f"{len(parts) - len(missing)} of {len(parts)} parts are there already")
    for number, (part, values) in enumerate(_made(missing, cache, jobs), 1):
        kept.save(part.name, part.decided_by, values)
        done[part] = values
        say(f"{number}/{len(missing)}  {part.method}, seed {part.seed}: {summary(values)}")
    return {part: done[part] for part in parts}


def _made(parts: Sequence[Part], cache: Path, jobs: int) -> Iterator[tuple[Part, Any]]:
    """Yield each part with its values as soon as it is finished."""
    if jobs == 1 or len(parts) < 2:
        for part in parts:
            yield part, measure(part, cache)
        return
    with ProcessPoolExecutor(jobs, get_context("spawn"), initializer=_one_thread) as pool:
        running = {pool.submit(measure, part, cache): part for part in parts}
        for future in as_completed(running):
            yield running[future], future.result()


def _one_thread() -> None:
    """Set what a spawned process does not inherit."""
    warnings.filterwarnings("ignore")
    os.environ["OMP_NUM_THREADS"] = "1"
    import torch
    import transformers

    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()


def summary(values: dict[str, Any]) -> str:
    """Return a part's values in a few words."""
    if "questions" in values:
        return f"{len(values['questions'])} hard questions"
    if "curve" not in values:
        return "scored"
    first, last = values["curve"][0], values["curve"][-1]
    return f"{first['accuracy']:.1%} -> {last['accuracy']:.1%} in {values['seconds']:.0f} s"


def prepare(task: str, seeds: Sequence[int], cache: Path) -> None:
    """Make the base models before the parts: two processes must not make the same one."""
    base = make_task(task).base_model
    for seed in seeds:
        say(f"base model of seed {seed}: {base(seed, cache)}")
