"""``python -m benchmarks.session``: the two stages, and what was carried for them.

Exit status: 0; 1 if a step failed; 2 for wrong use.
"""

import argparse
import importlib.util
import os
import subprocess
import sys
import tarfile
from collections.abc import Sequence
from pathlib import Path

from benchmarks.session.steps import Session, Step

ROOT = Path(__file__).parents[2]
PLACE = ROOT / "build" / "session"  # of what was carried, unpacked
MODULE = "-m"
SECONDS = {1: 330.0, 2: 480.0}
WORKERS = 8  # processes of the tests
FIRST, REST = "main,scaling,sparse", "frozen,rlsd,accuracy,shapes,objectives,compiled"
STEP_PROVIDERS = "trl-topk,fused-topk,trl-distillation,fused-full,trl-full"
QUICK = "reverse_kl,gkd,sdpo,sd_zero,rlsd"
TINY = ("--device", "cpu", "--tokens", "8", "--hidden", "16", "--vocab", "200")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a stage and return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.session")
    add = parser.add_argument
    add("stage", type=int, choices=(1, 2))
    add("--out", type=Path, required=True, help="folder for all results and logs")
    add("--wheels", type=Path, help="folder of wheels to install first, without their needs")
    add("--cache", type=Path, help="Triton's cache of benchmarks.prime: a folder, or a tar of it")
    add("--seconds", type=float, help=f"time of all steps (default {SECONDS})")
    add("--commit", help="commit to store in the results, for a copy without .git")
    add("--dry", action="store_true", help="tiny sizes on a CPU, to see that everything runs")
    options = parser.parse_args(arguments)
    for path in (options.wheels, options.cache):
        if path is not None and not path.exists():
            parser.error(f"{path} must exist; prepare it, or leave it out")
    options.out.mkdir(parents=True, exist_ok=True)
    environment = prepared(options.wheels, options.cache, options.dry)
    seconds = options.seconds or SECONDS[options.stage] * (10 if options.dry else 1)
    session = Session(options.out, environment, seconds)
    if options.stage == 1:
        first_stage(session, options.out, options.dry)
    else:
        second_stage(session, options.out, options.dry, options.commit)
    for failure in session.failed:
        session.say(f"failed with {failure}")
    return 1 if session.failed else 0


def prepared(wheels: Path | None, cache: Path | None, dry: bool) -> dict[str, str]:
    """Unpack what was carried; return the environment in which it is found."""
    site, triton = PLACE / "site", PLACE / "triton"
    if wheels is not None:
        install = [sys.executable, MODULE, "pip", "install", "-q", "--no-index", "--no-deps"]
        install += ["--no-compile", "--upgrade", "--target", str(site)]
        subprocess.run([*install, *map(str, sorted(wheels.glob("*.whl")))], check=True)
    triton.mkdir(parents=True, exist_ok=True)
    if cache is not None and cache.is_file():
        with tarfile.open(cache) as archive:
            archive.extractall(triton, filter="data")
    elif cache is not None:
        triton = cache.resolve()
    paths = [str(site), str(ROOT), os.environ.get("PYTHONPATH", "")]
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(path for path in paths if path),
        "PYTHONUNBUFFERED": "1",
        "OMP_NUM_THREADS": "1" if dry else "4",
        "TRITON_CACHE_DIR": str(triton),
        "HF_HUB_OFFLINE": "1",
        "TRL_EXPERIMENTAL_SILENCE": "1",
    }


def first_stage(session: Session, out: Path, dry: bool) -> None:
    """Right?  What does each part take?  Which launches are best?"""

    def step(log: str, seconds: float, *arguments: str) -> Step:
        return Step(lambda left: arguments, seconds if not dry else 10 * seconds, log)

    def verify(*arguments: str) -> tuple[str, ...]:
        sizes = (*TINY, "--losses", "reverse_kl") if dry else ("--device", "cuda")
        return (MODULE, "fused_sd", "verify", *sizes, *arguments)

    tests = [MODULE, "pytest", "-q", "-p", "no:benchmark", "@tests/gpu.txt"]
    if importlib.util.find_spec("xdist") is not None:
        tests += ["-n", "1" if dry else str(WORKERS)]
    session.run([step("environment.txt", 30, MODULE, "benchmarks.session.card")])
    session.run([step("verify.txt", 60, *verify(*([] if dry else ["--losses", QUICK])))])
    session.run(
        [step("tests.txt", 150, *tests, *(["--collect-only"] if dry else []))],
        [step("verify.txt", 60, *verify("--dtype", name)) for name in ("bf16", "fp16", "fp32")],
    )
    tiny = ["--tiny"] if dry else []
    probe = ["benchmarks.probe", "--out", str(out / "probe.jsonl"), "--resume", *tiny]
    session.run([step("probe.txt", 100, MODULE, *probe)])
    tune = ["benchmarks.tune", "--write", str(out / "tuned.json"), *tiny]
    session.run([step("tune.txt", 100, MODULE, *tune)])


def second_stage(session: Session, out: Path, dry: bool, commit: str | None) -> None:
    """The table against peers, scaling, sparse gradients, a training step, and what else fits."""
    stored = [] if commit is None else ["--commit", commit]

    def suite(parts: str, share: float) -> Step:
        chosen = ["--suite", "cpu" if dry else "gpu", "--parts", parts, "--out", str(out)]
        chosen += ["--resume", *stored]

        def command(seconds: float) -> list[str]:
            minutes = max(0.0, seconds - 5) / 60
            return [MODULE, "benchmarks.run", *chosen, "--minutes", f"{minutes:.2f}"]

        return Step(command, share * session.seconds, "suite.txt", (0, 3), continued=True)

    def training(seconds: float) -> list[str]:
        sizes = ["--device", "cuda", "--models", "qwen3-1.7b", "--lengths", "4096,16384"]
        if dry:
            sizes = ["--device", "cpu", "--models", "tiny", "--lengths", "64"]
        fixed = ["--steps", "2", "--longest-cap", "0", "--providers", STEP_PROVIDERS]
        budget = ["--budget-seconds", f"{max(0.0, seconds - 10):.0f}"]
        place = ["--out", str(out / "step"), *stored]
        return [MODULE, "benchmarks.step", *sizes, *fixed, *budget, *place, "--resume"]

    first, rest = ("accuracy", "accuracy") if dry else (FIRST, REST)
    session.run([suite(first, 0.6)])
    session.run([Step(training, 0.3 * session.seconds, "step.txt", (0, 3))])
    session.run([suite(rest, 1.0)])


if __name__ == "__main__":
    raise SystemExit(main())
