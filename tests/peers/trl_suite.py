"""TRL's own tests with its trainers and with ours in their place.

    python tests/peers/trl_suite.py CHECKOUT [FILE ...] [--only EXPRESSION] [--mode MODE]

CHECKOUT is a folder with TRL's package ``tests``, of any version: it runs against the installed
TRL.  FILEs are relative to it; without any, those of FILES run.  Nothing is downloaded: models and
data are tiny stand-ins under the hub's names.  Each file runs twice in fp32.  The exit status is 1
if a test passes with TRL's trainers and not with ours, or if a value that both log differs.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
FILES = (
    "tests/experimental/test_sdpo_trainer.py",
    "tests/experimental/test_sdft_trainer.py",
    "tests/experimental/test_self_distillation_trainer_behavior.py",
    "tests/experimental/test_gkd_trainer.py",
    "tests/test_grpo_trainer.py",
)
MODES = ("", "sampled_token", "topk_logits", "full_logits")
RELATIVE, ABSOLUTE = 1e-4, 1e-5  # of a logged value, in fp32
NUM_LOGS = 10  # of each test: after more steps rounding has led two equal trainings apart


@dataclass
class Comparison:
    """What one file's tests did with TRL's trainers and with ours.

    Attributes:
        file: The file's name.
        stock: Each outcome's number of tests with TRL's trainers.
        ours: The same with ours.
        fused: Requests that ours answered from hidden states.
        logits: Forwards that made logits of several positions, with TRL's trainers and with ours.
        values: Logged values that were compared.
        worst: The largest difference of them, in units of the tolerance.
        failing: Tests that fail with TRL's trainers, with the reason.
        lost: Tests that pass with TRL's trainers alone, with the reason.
        differ: Tests with a value out of tolerance, with that value.
    """

    file: str
    stock: Counter[str] = field(default_factory=Counter)
    ours: Counter[str] = field(default_factory=Counter)
    fused: int = 0
    logits: tuple[int, int] = (0, 0)
    values: int = 0
    worst: float = 0.0
    failing: list[str] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)
    differ: list[str] = field(default_factory=list)


def run(
    file: str,
    folder: Path,
    *,
    swap: bool,
    more: Sequence[str] = (),
    mode: str = "",
    scale: float = 1,
) -> Any:
    """Run one file of tests; return what the plugin recorded of each, by name.

    Args:
        file: The file, relative to the folder.
        folder: The working directory, which holds the tests and the stand-ins.
        swap: Whether our trainers take the place of TRL's.
        more: Arguments of pytest.
        mode: A distillation_mode that every configuration gets; empty: its own.
        scale: A factor on our losses.
    """
    record = folder / f"record-{swap}.jsonl"
    record.unlink(missing_ok=True)
    environment = os.environ | {
        "FUSED_SD_SWAP": str(int(swap)),
        "FUSED_SD_RECORD": str(record),
        "FUSED_SD_MODE": mode,
        "FUSED_SD_SCALE": str(scale),
        "PYTHONPATH": os.pathsep.join(map(str, (folder, ROOT, HERE))),
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_CACHE": str(folder / "cache"),
        "TRL_EXPERIMENTAL_SILENCE": "1",
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
    }
    arguments = ["-q", "-p", "trl_plugin", "-p", "no:cacheprovider", "-c", os.devnull]
    arguments += [f"--rootdir={folder}", "-W", "ignore", "--tb=line", file, *more]
    ran = subprocess.run(
        [sys.executable, "-m", "pytest", *arguments],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
    )
    if not record.exists():
        raise SystemExit(f"{file} ran no test:\n{ran.stdout[-3000:]}{ran.stderr[-3000:]}")
    found = map(json.loads, record.read_text(encoding="utf-8").splitlines())
    return {line["test"]: line for line in found}


def compare(file: str, stock: dict[str, Any], ours: dict[str, Any]) -> Comparison:
    """Compare the two runs of a file."""
    result = Comparison(Path(file).name)
    result.stock.update(line["outcome"] for line in stock.values())
    result.ours.update(line["outcome"] for line in ours.values())
    result.fused = sum(line["fused"] for line in ours.values())
    result.logits = tuple(sum(one["logits"] for one in way.values()) for way in (stock, ours))
    for test, before in stock.items():
        after = ours.get(test)
        name = test.split("::", 1)[-1]
        if before["outcome"] == "failed":
            result.failing.append(f"{name}: {before['why']}")
        if before["outcome"] != "passed":
            continue
        if after is None or after["outcome"] != "passed":
            result.lost.append(f"{name}: {after.get('why', '') if after else 'not run'}")
            continue
        if len(before["logged"]) != len(after["logged"]):
            result.differ.append(f"{name}: logged {len(after['logged'])} times")
        for number, (one, two) in enumerate(zip(before["logged"][:NUM_LOGS], after["logged"])):
            for key, value in one.items():
                result.values += 1
                if key not in two:
                    result.differ.append(f"{name}: {key} is not logged")
                    continue
                off = abs(two[key] - value) / (ABSOLUTE + RELATIVE * abs(value))
                result.worst = max(result.worst, off)
                if off > 1:
                    result.differ.append(f"{name}: {key}[{number}] {value:g} -> {two[key]:g}")
    return result


def prepared(checkout: Path, folder: Path) -> None:
    """Copy TRL's tests into a working directory, and write the stand-ins there."""
    import trl_stand_ins

    shutil.copytree(checkout / "tests", folder / "tests")
    trl_stand_ins.write(folder)


def lines_of(result: Comparison) -> list[str]:
    """Return a comparison as text: a row, and below it what is wrong."""
    counts = [" ".join(f"{n} {kind}" for kind, n in c.items()) for c in (result.stock, result.ours)]
    row = f"{result.file:46}{counts[0]:32}{counts[1]:32}{result.fused:6}"
    row += f"{result.logits[0]:6} ->{result.logits[1]:5}{result.values:7}{result.worst:9.3f}"
    notes = {"fails with TRL's": result.failing, "lost": result.lost, "differs": result.differ}
    return [row, *(f"  {kind}: {one}" for kind, found in notes.items() for one in found)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("checkout", type=Path, help="folder with TRL's package tests")
    parser.add_argument("files", nargs="*", default=FILES, help="test files, relative to it")
    parser.add_argument("--only", help="pytest's -k")
    parser.add_argument("--mode", choices=MODES, default="", help="of all self-distillation")
    parser.add_argument("--scale", type=float, default=1, help="a factor on our losses, to be seen")
    options = parser.parse_args()
    more = ["-k", options.only] if options.only else []
    print(
        f"{'file':46}{'TRL':32}{'ours':32}{'fused':>6}{'logits':>14}{'values':>7}{'worst':>9}",
        flush=True,
    )
    wrong = 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepared(options.checkout, folder)
        for file in options.files:
            how = {"more": more, "mode": options.mode}
            stock = run(file, folder, swap=False, **how)
            ours = run(file, folder, swap=True, scale=options.scale, **how)
            result = compare(file, stock, ours)
            print("\n".join(lines_of(result)), flush=True)
            wrong += len(result.lost) + len(result.differ)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.path[:0] = [str(HERE), str(ROOT / "tests" / "support")]
    sys.exit(main())
