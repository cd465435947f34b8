"""``python -m benchmarks.methods``: train every method, measure, write results, table and plots."""

import argparse
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.running import quiet, say

MODELS = ("tiny", "smollm2")
WORK = Path("~/.cache/fused_sd/methods")


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.methods", description=__doc__)
    add = parser.add_argument
    add(
        "command",
        nargs="?",
        choices=("run", "report", "select"),
        default="run",
        help="run: train and report (default); report: table and plots of the stored results; "
        "select: learning rates on the validation questions",
    )
    add("--model", choices=MODELS, default="tiny")
    add("--methods", nargs="+", help="default: all")
    add("--seeds", type=int, help="number of seeds (default: 5; smollm2: 2)")
    add("--steps", type=int, help="optimizer steps (default: see settings.py)")
    add("--jobs", type=int, default=1, help="number of processes, with one thread each")
    add("--resume", action="store_true", help="keep the parts that are finished")
    add("--quick", action="store_true", help="two steps and few questions")
    add("--work", type=Path, default=WORK, help="folder of the base models and finished parts")
    add("--results", type=Path, help="folder of the results' JSON")
    add("--docs", type=Path, help="folder of the plots")
    add("--update-readme", type=Path, metavar="FILE", help="write the table into this file")
    options = parser.parse_args(arguments)
    for name in ("seeds", "steps", "jobs"):
        value = getattr(options, name)
        if value is not None and value < 1:
            parser.error(f"--{name} must be at least 1, got {value}")
    options.work = options.work.expanduser().resolve()
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    quiet()
    import transformers

    from benchmarks.methods import figures, report, settings
    from benchmarks.storage import RESULTS, ROOT, write_whole
    from fused_sd.measuring.readme import Block

    transformers.logging.set_verbosity_error()
    known = list(settings.METHODS)
    for name in options.methods or []:
        if name not in known:
            raise SystemExit(f"--methods must name some of {', '.join(known)}, got {name}")
    path = (options.results or RESULTS / "methods") / f"{options.model}.json"
    readme = options.update_readme
    block = Block(readme, f"methods {options.model}") if readme else None
    if options.command == "select":
        return print_rates(options)
    if options.command == "run":
        write_whole(path, json.dumps(run(options), indent=1) + "\n")
        say(f"wrote {path}")
    results = json.loads(path.read_text(encoding="utf-8"))
    lines = report.markdown_lines(results)
    print("\n".join(lines))
    for plot in figures.plots(results, options.docs or ROOT / "docs" / "images"):
        say(f"wrote {plot}")
    if block is not None:
        block.fill(lines)
    return None


def scale_of(options: argparse.Namespace) -> Any:
    """Return the experiment's size, with the command line's changes."""
    from benchmarks.methods import settings

    scale = settings.QUICK if options.quick else settings.SCALES[options.model]
    return dataclasses.replace(scale, steps=options.steps) if options.steps else scale


def make(options: argparse.Namespace, parts: Sequence[Any], seeds: Sequence[int]) -> dict[Any, Any]:
    """Make the base models and the missing parts; return the values of all parts."""
    from benchmarks.methods import runs
    from benchmarks.methods.pretrain import VERSION
    from benchmarks.storage import Parts

    runs.prepare(options.model, seeds, options.work)
    kept = Parts(options.work / f"parts-{VERSION}")
    return runs.make(parts, kept, options.work, jobs=options.jobs, resume=options.resume)


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Train every method with every seed and return the results."""
    from benchmarks.methods import collect, runs, settings
    from benchmarks.storage import stamp
    from fused_sd.measuring.environment import default_device

    model, scale = options.model, scale_of(options)
    seeds = range(options.seeds or (5 if model == "tiny" else 2))
    methods = options.methods or settings.methods_of(model)
    parts = [
        runs.Part(model, name, settings.learning_rate(model, name), seed, scale)
        for seed in seeds
        for name in methods
    ]
    if model == "tiny":
        others = ((runs.PLANTED, 0.0), (runs.DISCOVERY, settings.DISCOVERY_RATE))
        parts += [runs.Part(model, *other, seed, scale) for seed in seeds for other in others]
    values = make(options, parts, seeds)
    return {
        "model": model,
        "scale": {**dataclasses.asdict(scale), "generations_per_question": settings.GROUP},
        "seeds": list(seeds),
        "num_questions": len(next(iter(values.values()))["curve"][0]["right"]),
        "environment": stamp(default_device()),
        **collect.results(values),
    }


def print_rates(options: argparse.Namespace) -> None:
    """Measure every learning rate and print the table ``RATES`` for settings.py."""
    from benchmarks.methods import runs, settings

    model, scale, seed = options.model, scale_of(options), settings.SELECTION_SEED
    parts = [
        runs.Part(model, name, rate, seed, scale, "validation")
        for name in options.methods or settings.methods_of(model)
        for rate in settings.GRID[model]
    ]
    table: dict[str, dict[float, float]] = {}
    for part, measured in make(options, parts, [seed]).items():
        table.setdefault(part.method, {})[part.rate] = round(measured["curve"][-1]["accuracy"], 3)
    for name, rates in table.items():
        print(f'        "{name}": {rates},')


if __name__ == "__main__":
    main()
