"""All parts of an experiment: which are missing, and making them, on one process or several."""

import dataclasses
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from benchmarks.methods import settings
from benchmarks.methods.settings import Scale
from benchmarks.methods.storage import Parts
from benchmarks.methods.task import Task

Say = Callable[[str], None]
PLANTED, DISCOVERY = "planted", "discovery"


@dataclass(frozen=True)
class Part:
    """One thing to measure: a method and a seed, or what is measured beside the training.

    Attributes:
        task: "tiny" or "smollm2".
        method: a key of ``settings.METHODS``, ``PLANTED`` or ``DISCOVERY``.
        rate: learning rate.
        seed: of the base model, where it has one, and of the training.
        scale: how much is run.
        asked: part of the questions that is looked at.
    """

    task: str
    method: str
    rate: float
    seed: int
    scale: Scale
    asked: str = "held_out"

    @property
    def name(self) -> str:
        """Of its file."""
        return (
            f"{self.task}-{self.method}-{self.seed}-{self.scale.steps}-{self.rate:g}-{self.asked}"
        )

    @property
    def decided_by(self) -> dict[str, Any]:
        """Everything that another part of this name could differ in."""
        chosen = settings.METHODS.get(self.method)
        if chosen is None:
            return {**dataclasses.asdict(self), "settings": dataclasses.asdict(self.search)}
        return {
            **dataclasses.asdict(self),
            "trainer": chosen.trainer,
            "settings": settings.method_settings(self.task, self.method),
        }

    @property
    def search(self) -> settings.Discovery:
        """How hard questions are found and worked on."""
        return settings.QUICK_DISCOVERY if self.scale == settings.QUICK else settings.Discovery()


def make_task(name: str) -> Task:
    """The task of a model."""
    if name == "tiny":
        from benchmarks.methods.arithmetic import addition

        return addition()
    from benchmarks.methods.plurals import plurals

    return plurals()


def measure(part: Part, cache: Path) -> Any:
    """Make one part."""
    task = make_task(part.task)
    if part.method == PLANTED:
        from benchmarks.methods.planted import NUM_QUESTIONS, score

        return score(task, part.seed, cache, part.scale.num_questions or NUM_QUESTIONS)
    if part.method == DISCOVERY:
        from benchmarks.methods.discovery import compare

        return compare(task, part.rate, part.seed, part.search, cache)
    from benchmarks.methods.train import run

    return run(task, part.method, part.rate, part.seed, part.scale, cache, part=part.asked)


def make(
    parts: Sequence[Part], kept: Parts, cache: Path, *, jobs: int, resume: bool, say: Say
) -> dict[Part, Any]:
    """Every part's values, in the order given.

    Args:
        resume: take finished parts from the folder; otherwise all are made anew.
        jobs: processes; each has one thread.
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
    """Parts as they are finished."""
    if jobs == 1 or len(parts) < 2:
        for part in parts:
            yield part, measure(part, cache)
        return
    with ProcessPoolExecutor(jobs, get_context("spawn"), initializer=_one_thread) as pool:
        running = {pool.submit(measure, part, cache): part for part in parts}
        for future in as_completed(running):
            yield running[future], future.result()


def _one_thread() -> None:
    """What a process of its own does not inherit."""
    warnings.filterwarnings("ignore")
    os.environ["OMP_NUM_THREADS"] = "1"
    import torch
    import transformers

    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()


def summary(values: dict[str, Any]) -> str:
    """A part in a few words."""
    if "questions" in values:
        return f"{len(values['questions'])} hard questions"
    if "curve" not in values:
        return "scored"
    first, last = values["curve"][0], values["curve"][-1]
    return f"{first['accuracy']:.1%} -> {last['accuracy']:.1%} in {values['seconds']:.0f} s"


def prepare(task: str, seeds: Sequence[int], cache: Path, say: Say) -> None:
    """Make the base models first: two processes must not make the same one."""
    base = make_task(task).base_model
    for seed in seeds:
        say(f"base model of seed {seed}: {base(seed, cache)}")
