"""``python -m benchmarks.sparse``: train dense and sparse, compare, write results and a report."""

import argparse
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from benchmarks.running import quiet, say

EXPERIMENTS = ("online", "replay")
WORK = Path("~/.cache/fused_sd/sparse")
REPLAY_SEEDS = 2  # the first of --seeds
Run = Callable[[str, dict[str, Any], Callable[[], Any]], Any]


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sparse", description=__doc__)
    add = parser.add_argument
    add("command", nargs="?", choices=("run", "report"), default="run")
    add("--experiments", nargs="+", choices=EXPERIMENTS, default=EXPERIMENTS)
    add("--seeds", type=_numbers, default=[0, 1, 2, 3], help="default: 0,1,2,3")
    add("--steps", type=int, help="optimizer steps (default: each experiment's own)")
    add("--device", default="auto", help="auto, cpu or cuda (default auto)")
    add("--resume", action="store_true", help="keep the runs that are finished")
    add("--work", type=Path, default=WORK, help="folder of the finished runs")
    add("--results", type=Path, help="folder of the results and the report")
    options = parser.parse_args(arguments)
    if options.steps is not None and options.steps < 2:
        parser.error(f"--steps must be at least 2, got {options.steps}")
    if len(set(options.seeds)) < 2:
        parser.error(f"--seeds must be two or more, got {options.seeds}: a spread needs them")
    return options


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    quiet()
    from benchmarks.sparse import report
    from benchmarks.storage import RESULTS, write_whole

    folder = options.results or RESULTS / "sparse"
    if options.command == "run":
        for experiment in options.experiments:
            text = json.dumps(make(experiment, options), indent=1) + "\n"
            write_whole(folder / f"{experiment}.json", text)
    say(f"wrote {report.write(folder)}")


def make(experiment: str, options: argparse.Namespace) -> dict[str, Any]:
    """Make the runs of an experiment that are not finished, and compare all of them."""
    import torch

    from benchmarks.storage import Parts, stamp
    from fused_sd.measuring.environment import default_device

    kept = Parts(options.work.expanduser().resolve())
    device = default_device() if options.device == "auto" else torch.device(options.device)

    def run(name: str, decided_by: dict[str, Any], measure: Callable[[], Any]) -> Any:
        values = kept.load(name, decided_by) if options.resume else None
        if values is None:
            started = time.perf_counter()
            values = measure()
            kept.save(name, decided_by, values)
            say(f"{name}: {time.perf_counter() - started:.0f} s")
        return values

    make_results = _online if experiment == "online" else _replay
    return {"environment": stamp(device), **make_results(options, device.type, run)}


def _online(options: argparse.Namespace, device: str, run: Run) -> dict[str, Any]:
    from benchmarks.sparse import comparison, online
    from benchmarks.sparse.arms import DENSE, SPARSE
    from fused_sd.demo.model import model_directory

    directory, settings = model_directory(), online.SETTINGS
    if options.steps:
        settings = replace(settings, steps=options.steps)
    runs: dict[str, list[Any]] = {DENSE.name: [], SPARSE.name: []}
    for seed in options.seeds:
        for arm in (DENSE, SPARSE):
            part = online.Part(arm, seed, settings, device)
            found = run(part.name, part.decided_by, lambda p=part: online.run(p, directory))
            runs[arm.name].append(found)
    compared = comparison.compare_online(runs)
    return {"seeds": options.seeds, "settings": asdict(settings), "compared": compared}


def _replay(options: argparse.Namespace, device: str, run: Run) -> dict[str, Any]:
    from benchmarks.sparse import comparison, replay
    from fused_sd.demo.model import load, model_directory

    directory, seeds = model_directory(), options.seeds[:REPLAY_SEEDS]
    scale = replay.Scale(steps=options.steps) if options.steps else replay.Scale()
    runs = [
        run(
            f"replay-{seed}-{scale.steps}-{device}",
            {"scale": asdict(scale)},
            lambda seed=seed: replay.run(*load(directory, device), seed, scale),
        )
        for seed in seeds
    ]
    compared = comparison.compare_replay(runs)
    return {"seeds": seeds, "scale": asdict(scale), "compared": compared}


if __name__ == "__main__":
    main()
