"""``python -m benchmarks.sparse``: train dense and sparse, compare, write results and a figure."""

import argparse
import json
import os
import time
import warnings
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

EXPERIMENTS = ("online", "replay")
WORK = Path("~/.cache/fused_sd/sparse")
RESULTS = Path(__file__).parents[1] / "results" / "sparse"


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sparse", description=__doc__)
    parser.add_argument("command", nargs="?", choices=("run", "report"), default="run")
    parser.add_argument("--experiments", nargs="+", choices=EXPERIMENTS, default=EXPERIMENTS)
    parser.add_argument("--seeds", type=_numbers, default=[0, 1, 2, 3], help="default: 0,1,2,3")
    parser.add_argument("--arms", nargs="+", help="beside dense; default: all")
    parser.add_argument("--steps", type=int, help="optimiser steps (default: each experiment's)")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda (default auto)")
    parser.add_argument("--resume", action="store_true", help="keep runs that are finished")
    parser.add_argument("--work", type=Path, default=WORK, help="finished runs")
    parser.add_argument("--results", type=Path, default=RESULTS, help="JSON, table and figure")
    chosen = parser.parse_args(arguments)
    if chosen.steps is not None and chosen.steps < 2:
        parser.error(f"--steps must be at least 2, got {chosen.steps}")
    if len(set(chosen.seeds)) < 2:
        parser.error(f"--seeds must be two or more, got {chosen.seeds}: a spread needs them")
    return chosen


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')}  {text}", flush=True)


def main(arguments: Sequence[str] | None = None) -> None:
    chosen = parse(arguments)
    from fused_sd.demo.model import quiet_and_offline

    quiet_and_offline()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    warnings.filterwarnings("ignore")
    from benchmarks.sparse import report
    from benchmarks.sparse.arms import ARMS

    for name in chosen.arms or []:
        if name not in ARMS:
            raise SystemExit(f"--arms must name some of {', '.join(ARMS)}, got {name}")
    if chosen.command == "run":
        for experiment in chosen.experiments:
            save(chosen.results, experiment, make(experiment, chosen))
    for path in report.write(chosen.results):
        say(f"wrote {path}")


def save(folder: Path, experiment: str, found: dict[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(found, indent=1) + "\n"
    (folder / f"{experiment}.json").write_text(text, encoding="utf-8")


def make(experiment: str, chosen: argparse.Namespace) -> dict[str, Any]:
    """All runs of an experiment, those that are finished taken as they are."""
    from benchmarks.methods.storage import Parts, environment
    from benchmarks.sparse import comparison, online, replay
    from benchmarks.sparse.arms import ARMS, DENSE
    from fused_sd.demo.model import load, model_directory
    from fused_sd.measuring.environment import default_device

    kept, directory = Parts(chosen.work.expanduser().resolve()), model_directory()
    device = default_device().type if chosen.device == "auto" else chosen.device
    arms = [ARMS[name] for name in chosen.arms or ARMS if name != DENSE.name]
    facts = {"seeds": chosen.seeds, "environment": environment()}

    def part(name: str, decided_by: dict[str, Any], measure: Any) -> Any:
        values = kept.load(name, decided_by) if chosen.resume else None
        if values is None:
            started = time.perf_counter()
            values = measure()
            kept.save(name, decided_by, values)
            say(f"{name}: {time.perf_counter() - started:.0f} s")
        return values

    if experiment == "online":
        settings = online.SETTINGS
        if chosen.steps:
            settings = replace(settings, steps=chosen.steps)
        runs: dict[str, list[Any]] = {arm.name: [] for arm in (DENSE, *arms)}
        for seed in chosen.seeds:
            for arm in (DENSE, *arms):
                one = online.Part(arm, seed, settings, device)
                found = part(one.name, one.decided_by, lambda one=one: online.run(one, directory))
                runs[arm.name].append(found)
        compared = comparison.compare_online(runs)
        return {**facts, "settings": asdict(settings), "compared": compared, "runs": runs}

    scale = replay.Scale(steps=chosen.steps) if chosen.steps else replay.Scale()
    draws = []
    for seed in chosen.seeds[:2]:
        name = f"replay-{seed}-{scale.steps}-{device}"
        decided_by = {"scale": asdict(scale), "arms": [asdict(arm) for arm in arms]}

        def measure(seed: int = seed) -> dict[str, Any]:
            return replay.run(*load(directory, device), arms, seed, scale)

        draws.append(part(name, decided_by, measure))
    facts["seeds"] = chosen.seeds[:2]
    compared = comparison.compare_replay(draws)
    return {**facts, "scale": asdict(scale), "compared": compared, "runs": draws}


if __name__ == "__main__":
    main()
