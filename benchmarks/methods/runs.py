"""The runs of an experiment, and making the missing ones in one process or several."""

import dataclasses
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from statistics import fmean
from typing import Any

from benchmarks.methods.arms import Arm
from benchmarks.methods.experiments import Experiment, Scale, Search, Unit
from benchmarks.methods.records import Records
from benchmarks.methods.tasks import make_task, version
from benchmarks.running import say


@dataclass(frozen=True)
class Run:
    """One training or search: an arm with a learning rate on a unit.

    Attributes:
        task: The task's name.
        arm: The method.
        rate: The learning rate; None: the model is not trained.
        unit: The base model and the seed.
        scale: The size of the training or search.
        part: The part of the questions that is evaluated or searched.
    """

    task: str
    arm: Arm
    rate: float | None
    unit: Unit
    scale: Scale | Search
    part: str = "held_out"

    @property
    def decided_by(self) -> dict[str, Any]:
        """Every setting that decides the run's values.

        Labels do not.  Settings that an arm does without are left out, so that a new kind of
        setting does not make all older runs count as missing.
        """
        values = dataclasses.asdict(self) | {"version": version(self.task)}
        values["arm"] = {name: value for name, value in values["arm"].items() if value}
        del values["arm"]["label"]
        if phase := values["arm"].get("phase_one"):
            values["arm"]["phase_one"] = {n: v for n, v in phase.items() if v is not None}
        return values


def measure(run: Run, cache: Path) -> dict[str, Any]:
    """Make one run and return its values."""
    from benchmarks.methods import discovery, revision, train

    task = make_task(run.task, run.unit.base)
    if isinstance(run.scale, Search):
        how = discovery.run
    else:
        how = train.run if run.arm.phase_one is None else revision.run
    return how(task, run.arm, run.rate, run.unit.seed, run.scale, cache, part=run.part)


def selecting(experiment: Experiment) -> list[Run]:
    """Return the runs that choose the learning rates."""
    return [
        Run(experiment.task, arm, rate, unit, experiment.selection_scale, "validation")
        for unit in experiment.selection
        for arm in experiment.arms
        if arm.trainer is not None
        for rate in experiment.rates
    ]


def score(values: dict[str, Any]) -> float:
    """Return what chooses a rate: the last accuracy, or the mean of a search's probabilities."""
    if "probability" in values:
        return fmean(values["probability"].values())
    return values["curve"][-1]["accuracy"]


def selected(experiment: Experiment, records: Records) -> dict[str, dict[float, float]]:
    """Return each trained arm's mean validation scores, by rate, from the finished runs.

    Raises:
        ValueError: A run is missing.
    """
    table: dict[str, dict[float, list[float]]] = {}
    for run in selecting(experiment):
        record = records.find(run.decided_by)
        if record is None:
            raise ValueError(
                f"every learning rate must be measured before the final runs, got none of "
                f"{run.arm.name} at {run.rate:g}; run `python -m benchmarks.methods select "
                f"{experiment.name}`"
            )
        by_rate = table.setdefault(run.arm.name, {})
        by_rate.setdefault(run.rate, []).append(score(record.values))
    return {
        name: {rate: fmean(found) for rate, found in rates.items()} for name, rates in table.items()
    }


def best_rate(measured: dict[float, float]) -> float:
    """Return the best of the measured rates; the smallest of equally good ones."""
    return min(measured, key=lambda rate: (-measured[rate], rate))


def final(experiment: Experiment, records: Records) -> list[Run]:
    """Return the final runs, unit by unit: after each unit all arms have equally many."""
    rates = {name: best_rate(found) for name, found in selected(experiment, records).items()}
    return [
        Run(experiment.task, arm, rates.get(arm.name), unit, experiment.scale)
        for unit in experiment.units
        for arm in experiment.arms
    ]


def make(runs: Sequence[Run], records: Records, cache: Path, *, jobs: int, stamp: Any) -> None:
    """Make the runs that are not recorded.

    Args:
        runs: The runs.
        records: The file of finished runs.
        cache: The folder of the base models.
        jobs: The number of processes, with one thread each.
        stamp: The machine, versions and commit that each record names.
    """
    missing = [run for run in runs if records.find(run.decided_by) is None]
    say(f"{len(runs) - len(missing)} of {len(runs)} runs are there already")
    # two processes must not make the same model
    models = dict.fromkeys((run.task, run.unit.base, cache) for run in missing)
    for _ in _each(_prepare, list(models), jobs):
        pass
    made = _each(measure, [(run, cache) for run in missing], jobs)
    for number, ((run, _), values) in enumerate(made, 1):
        records.add(run.decided_by, values, stamp)
        rate = "" if run.rate is None else f" {run.rate:g}"
        say(
            f"{number}/{len(missing)}  {run.arm.name}{rate}, base {run.unit.base}: "
            f"{summary(values)}"
        )


def _prepare(task: str, base: int, cache: Path) -> None:
    """Make a base model that is not there yet."""
    make_task(task, base).load(cache)


def _each(
    function: Callable[..., Any], calls: Sequence[tuple[Any, ...]], jobs: int
) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """Yield the arguments of each call and what it returns, as soon as it has."""
    if jobs == 1:
        for call in calls:
            yield call, function(*call)
        return
    with ProcessPoolExecutor(jobs, get_context("spawn"), initializer=_one_thread) as pool:
        running = {pool.submit(function, *call): call for call in calls}
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
    """Return a run's values in a few words."""
    if "probability" in values:
        shown = ", ".join(f"{count}: {share:.0%}" for count, share in values["probability"].items())
        return f"{shown} in {values['seconds']:.0f} s"
    first, last = values["curve"][0], values["curve"][-1]
    return f"{first['accuracy']:.1%} -> {last['accuracy']:.1%} in {values['seconds']:.0f} s"
