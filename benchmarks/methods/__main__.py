"""``python -m benchmarks.methods``: train, measure, write results, table and plots."""

import argparse
import json
import os
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

MODELS = ("tiny", "smollm2")
COMMANDS = ("run", "report", "select", "contexts")
WORK = Path("~/.cache/fused_sd/methods")


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.methods", description=__doc__)
    parser.add_argument(
        "command",
        nargs="?",
        choices=COMMANDS,
        default="run",
        help="run: train and report (default); report: table and plots of the stored results; "
        "select: learning rates on the validation questions; contexts: what the base model makes "
        "of each teacher's context",
    )
    parser.add_argument("--model", choices=MODELS, default="tiny")
    parser.add_argument("--methods", nargs="+", help="default: all")
    parser.add_argument("--seeds", type=int, help="number of seeds (default: 5; smollm2: 2)")
    parser.add_argument("--steps", type=int, help="optimiser steps (default: see settings.py)")
    parser.add_argument("--jobs", type=int, default=1, help="processes, each with one thread")
    parser.add_argument("--resume", action="store_true", help="keep parts that are finished")
    parser.add_argument("--quick", action="store_true", help="two steps, few questions")
    parser.add_argument("--work", type=Path, default=WORK, help="base models and finished parts")
    parser.add_argument("--results", type=Path, help="folder of the results' JSON")
    parser.add_argument("--docs", type=Path, help="folder of the plots")
    parser.add_argument("--update-readme", type=Path, metavar="FILE", help="put the table there")
    chosen = parser.parse_args(arguments)
    for name in ("seeds", "steps", "jobs"):
        value = getattr(chosen, name)
        if value is not None and value < 1:
            parser.error(f"--{name} must be at least 1, got {value}")
    return chosen


def quiet_and_offline() -> None:
    """Before the libraries are imported."""
    from fused_sd.demo.model import quiet_and_offline as quiet

    quiet()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    warnings.filterwarnings("ignore")


def say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')}  {text}", flush=True)


def main(arguments: Sequence[str] | None = None) -> None:
    chosen = parse(arguments)
    quiet_and_offline()
    import transformers

    from benchmarks.methods import figures, report, settings
    from benchmarks.methods.storage import RESULTS, ROOT

    transformers.logging.set_verbosity_error()
    known = list(settings.METHODS)
    for name in chosen.methods or []:
        if name not in known:
            raise SystemExit(f"--methods must name some of {', '.join(known)}, got {name}")
    chosen.work = chosen.work.expanduser().resolve()
    path = (chosen.results or RESULTS) / f"{chosen.model}.json"
    if chosen.update_readme:
        report.check_readme(chosen.update_readme, chosen.model)
    if chosen.command == "contexts":
        return contexts(chosen)
    if chosen.command == "select":
        return select(chosen)
    if chosen.command == "run":
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(run(chosen), indent=1) + "\n", encoding="utf-8")
        say(f"wrote {path}")
    found = json.loads(path.read_text(encoding="utf-8"))
    lines = report.markdown_lines(found)
    print("\n".join(lines))
    for picture in figures.plots(found, chosen.docs or ROOT / "docs" / "images"):
        say(f"wrote {picture}")
    if chosen.update_readme:
        report.update_readme(chosen.update_readme, lines, chosen.model)
    return None


def scale_of(chosen: argparse.Namespace) -> Any:
    """The experiment's size after the command line's wishes."""
    import dataclasses

    from benchmarks.methods import settings

    scale = settings.QUICK if chosen.quick else settings.SCALES[chosen.model]
    return dataclasses.replace(scale, steps=chosen.steps) if chosen.steps else scale


def run(chosen: argparse.Namespace) -> dict[str, Any]:
    """Every part, and the results."""
    import dataclasses

    from benchmarks.methods import collect, runs, settings
    from benchmarks.methods.pretrain import VERSION
    from benchmarks.methods.storage import Parts, environment

    scale = scale_of(chosen)
    seeds = range(chosen.seeds or (5 if chosen.model == "tiny" else 2))
    methods = chosen.methods or settings.methods_of(chosen.model)
    parts = [
        runs.Part(chosen.model, name, settings.learning_rate(chosen.model, name), seed, scale)
        for seed in seeds
        for name in methods
    ]
    if chosen.model == "tiny":
        others = ((runs.PLANTED, 0.0), (runs.DISCOVERY, settings.DISCOVERY_RATE))
        parts += [
            runs.Part(chosen.model, *other, seed, scale) for seed in seeds for other in others
        ]
    runs.prepare(chosen.model, seeds, chosen.work, say)
    values = runs.make(
        parts,
        Parts(chosen.work / f"parts-{VERSION}"),
        chosen.work,
        jobs=chosen.jobs,
        resume=chosen.resume,
        say=say,
    )
    return {
        "model": chosen.model,
        "scale": {**dataclasses.asdict(scale), "generations_per_question": settings.GROUP},
        "seeds": list(seeds),
        "num_questions": len(next(iter(values.values()))["curve"][0]["right"]),
        "environment": environment(),
        **collect.results(values),
    }


def select(chosen: argparse.Namespace) -> None:
    """Print the table of learning rates for settings.py."""
    from benchmarks.methods import runs, settings
    from benchmarks.methods.pretrain import VERSION
    from benchmarks.methods.storage import Parts

    scale, seed = scale_of(chosen), settings.SELECTION_SEED
    parts = [
        runs.Part(chosen.model, name, rate, seed, scale, "validation")
        for name in chosen.methods or settings.methods_of(chosen.model)
        for rate in settings.GRID[chosen.model]
    ]
    runs.prepare(chosen.model, [seed], chosen.work, say)
    values = runs.make(
        parts,
        Parts(chosen.work / f"parts-{VERSION}"),
        chosen.work,
        jobs=chosen.jobs,
        resume=chosen.resume,
        say=say,
    )
    table: dict[str, dict[float, float]] = {}
    for part, measured in values.items():
        table.setdefault(part.method, {})[part.rate] = round(measured["curve"][-1]["accuracy"], 3)
    for name, measured in table.items():
        print(f'        "{name}": {measured},')


def contexts(chosen: argparse.Namespace) -> None:
    """Print the base models' accuracy after each teacher's context."""
    from benchmarks.methods import teachers
    from benchmarks.methods.runs import make_task

    for seed in range(chosen.seeds or 1):
        for name, share in teachers.accuracies(make_task(chosen.model), seed, chosen.work).items():
            print(f"seed {seed}  {name:40} {share:.1%}")


if __name__ == "__main__":
    main()
