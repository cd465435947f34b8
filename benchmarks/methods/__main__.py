"""``python -m benchmarks.methods``: the papers' claims, tried on tasks of a size for one CPU.

select EXPERIMENT   measures the grid of learning rates on validation questions
run EXPERIMENT      makes the final runs that are missing, with the best rates
report              writes docs/claims.md and its pictures from all stored runs
"""

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.running import quiet, say

WORK = Path("~/.cache/fused_sd/methods")
# what a record says of its run beside the settings
STAMPED = ("device", "commit", "fused_sd", "python", "torch", "transformers", "trl", "peft")


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.methods",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("command", choices=("select", "run", "report"))
    add("experiments", nargs="*", help="names in experiments.py; none: all")
    add("--arms", nargs="+", help="only these arms")
    add("--units", type=int, help="only the first units of the experiment")
    add("--jobs", type=int, default=1, help="number of processes, with one thread each")
    add("--quick", action="store_true", help="two steps, few questions, one rate, one unit")
    add("--work", type=Path, default=WORK, help="folder of the base models")
    add("--results", type=Path, help="folder of the runs' files")
    add("--docs", type=Path, help="folder of the page and its pictures")
    options = parser.parse_args(arguments)
    for name in ("units", "jobs"):
        value = getattr(options, name)
        if value is not None and value < 1:
            parser.error(f"--{name} must be at least 1, got {value}")
    options.work = options.work.expanduser().resolve()
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    quiet()
    import transformers

    from benchmarks.storage import RESULTS, ROOT

    transformers.logging.set_verbosity_error()
    results = options.results or RESULTS / "methods"
    if options.command == "report":
        from benchmarks.methods.report import write_page

        for path in write_page(results, options.docs or ROOT / "docs"):
            say(f"wrote {path}")
        return
    for experiment in chosen(options):
        make(experiment, options, results / experiment.file)


def chosen(options: argparse.Namespace) -> list[Any]:
    """Return the named experiments, with the command line's changes."""
    from benchmarks.methods.experiments import EXPERIMENTS, quick

    unknown = sorted(set(options.experiments) - set(EXPERIMENTS))
    if unknown:
        raise SystemExit(f"experiments must be some of {', '.join(EXPERIMENTS)}, got {unknown[0]}")
    found = [EXPERIMENTS[name] for name in options.experiments or EXPERIMENTS]
    if options.quick:
        found = [quick(experiment) for experiment in found]
    if options.units:
        found = [dataclasses.replace(e, units=e.units[: options.units]) for e in found]
    return found


def make(experiment: Any, options: argparse.Namespace, path: Path) -> None:
    """Make the missing runs of the command."""
    from benchmarks.methods import runs
    from benchmarks.methods.records import Records
    from benchmarks.storage import stamp
    from fused_sd.measuring.environment import default_device

    records = Records(path)
    selecting = options.command == "select"
    wanted = runs.selecting(experiment) if selecting else runs.final(experiment, records)
    if options.arms:
        wanted = [run for run in wanted if run.arm.name in options.arms]
    say(f"{options.command} {experiment.name}: {path}")
    facts = stamp(default_device())
    where = {name: facts[name] for name in STAMPED}
    runs.make(wanted, records, options.work, jobs=options.jobs, stamp=where)
    if selecting and not options.arms:
        for name, measured in runs.selected(experiment, records).items():
            shown = "  ".join(f"{rate:g}: {value:.1%}" for rate, value in measured.items())
            print(f"{name:24}{shown}  -> {runs.best_rate(measured):g}")


if __name__ == "__main__":
    main()
