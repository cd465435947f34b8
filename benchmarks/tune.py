"""Measure block sizes and warps of the programs that read whole rows, and write the fastest ones.

    python -m benchmarks.tune                 prints a table
    python -m benchmarks.tune --write         also writes it to kernels/tuned.json
    python -m benchmarks.tune --write FILE    also writes it to a file, with GPU and versions

Each program is timed alone on logits of several vocabularies, with a chunk's number of rows, which
are padded as in a run.  It takes half a minute.
``block_maxima`` and ``block_statistics`` are timed together with the search that follows them.  The
table shows a program's time and what share of this GPU's copy bandwidth it reaches; the aim is
85 %.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget

from benchmarks.offline import compiling
from fused_sd import Jsd
from fused_sd.engine.layout import workspace_width
from fused_sd.kernels import rows, selection
from fused_sd.kernels.tuning import TABLE, Launch, family_of, forced, launch_for
from fused_sd.measuring.environment import default_device, device_name
from fused_sd.terms.divergence_term import divergence_term
from fused_sd.torch_kernels.rows import RowGradient

CANDIDATES = (  # from 8 to 16 columns a thread: fewer wait for memory, more spill
    *(Launch(1024, 4), Launch(2048, 4), Launch(2048, 8)),
    *(Launch(4096, 8), Launch(4096, 16), Launch(8192, 16)),
)
VOCABULARIES = (151936, 100278, 248320)
NUM_ROWS = 512
Timer = Callable[[Callable[[], object]], float]  # seconds


class Task(NamedTuple):
    """A function that launches a program, and the bytes that the program must move."""

    program: str
    run: Callable[[], object]
    num_bytes: int


class Result(NamedTuple):
    """A program's fastest launch; times are sums over all vocabularies."""

    launch: Launch
    seconds: float
    default_seconds: float  # with the launch that is in use now
    bytes_per_second: float


def make_rows(num_rows: int, vocab: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Random logits of both sides, and memory for bf16 dlogits, as wide as in a run."""
    shape = num_rows, workspace_width(vocab)
    student = 4 * torch.randn(shape, device=device)
    teacher = student + 0.3 * torch.randn(shape, device=device)
    student[:, vocab:] = teacher[:, vocab:] = -torch.inf
    return student, teacher, torch.empty(shape, dtype=torch.bfloat16, device=device)


def make_tasks(num_rows: int, vocab: int, device: torch.device) -> list[Task]:
    """Every program that reads whole rows, on the logits of ``make_rows``."""
    student, teacher, out = make_rows(num_rows, vocab, device)
    ones = torch.ones(num_rows, device=device)
    sides = rows.normalizers(student, teacher)
    one, two, narrow = (4 * student.numel(), 8 * student.numel(), 2 * student.numel())
    reverse, jsd = divergence_term("reverse_kl"), divergence_term(Jsd(0.5))

    def compare(term: object, row_weights: Tensor | None) -> Callable[[], object]:
        gradient = None if row_weights is None else RowGradient(row_weights, None, out)
        return lambda: rows.divergence_(student, teacher, sides, term, None, gradient)

    return [
        Task("log_normalizer", lambda: rows.log_normalizer(student), one),
        Task("normalizers", lambda: rows.normalizers(student, teacher), two),
        Task("divergence", compare(jsd, None), two),
        Task("divergence_gradient", compare(reverse, ones), two + narrow),
        Task(
            "row_metrics", lambda: rows.row_metrics(student, teacher, sides, rows.ROW_METRICS), two
        ),
        Task(
            "softmax_gradient",
            lambda: rows.softmax_gradient_(student, sides.student, ones, None, None, out),
            one + narrow,
        ),
        Task("block_maxima", lambda: selection.top_k(student, 20), one),
        Task("block_statistics", lambda: selection.select(out[:, :vocab], 2.0**-8, 128), narrow),
    ]


def tune(
    device: torch.device,
    timer: Timer,
    num_rows: int = NUM_ROWS,
    vocabularies: Sequence[int] = VOCABULARIES,
    candidates: Sequence[Launch] = CANDIDATES,
) -> dict[str, Result]:
    """Time every candidate for every program, and choose by the sum over all vocabularies."""
    seconds: dict[str, dict[Launch, float]] = {}
    moved: dict[str, int] = {}
    for vocab in vocabularies:
        for task in make_tasks(num_rows, vocab, device):
            moved[task.program] = moved.get(task.program, 0) + task.num_bytes
            timed = seconds.setdefault(task.program, {})
            for launch in {*candidates, launch_for(task.program, device)}:
                with forced(task.program, launch):
                    timed[launch] = timed.get(launch, 0.0) + timer(task.run)
    results = {}
    for program, timed in seconds.items():
        best = min(timed, key=lambda launch: timed[launch])
        now = timed[launch_for(program, device)]
        results[program] = Result(best, timed[best], now, moved[program] / timed[best])
    return results


def copy_bandwidth(device: torch.device, timer: Timer, num_elements: int = 2**28) -> float:
    """Bytes that a large copy on the device reads and writes in a second."""
    source = torch.randn(num_elements, device=device)
    target = torch.empty_like(source)
    return 8 * source.numel() / timer(lambda: target.copy_(source))


def write(results: dict[str, Result], family: str, measured_on: dict[str, str], path: Path) -> None:
    """Write the library's table to a file, with the measured launches of a family of GPUs."""
    table = json.loads(TABLE.read_text(encoding="utf-8"))
    launches = {program: list(result.launch) for program, result in results.items()}
    table[family] = {"measured_on": measured_on, "launches": launches}
    path.write_text(json.dumps(table, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def median_seconds(run: Callable[[], object]) -> float:
    """Median time on a GPU."""
    median: float = triton.testing.do_bench(run, warmup=20, rep=60, return_mode="median")
    return median / 1e3


def seconds_once(run: Callable[[], object]) -> float:
    """Time of one run, on a CPU."""
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tune", description=__doc__)
    add = parser.add_argument
    add("--write", nargs="?", type=Path, const=TABLE, help=f"write FILE (default {TABLE.name})")
    add("--tiny", action="store_true", help="few launches; without a GPU they are only compiled")
    arguments = parser.parse_args(argv)
    device = default_device()
    if device.type == "cpu" and not arguments.tiny:
        print("benchmarks.tune: needs a GPU, and there is none", file=sys.stderr)
        return 2
    sizes = (NUM_ROWS, VOCABULARIES, CANDIDATES)
    if arguments.tiny:
        sizes = (2, (1000,), CANDIDATES[:1])
    if device.type == "cpu":
        bandwidth = copy_bandwidth(device, seconds_once, 2**10)
        with compiling(GPUTarget("cuda", 90, 32)):
            results = tune(torch.device("meta"), seconds_once, *sizes)
    else:
        bandwidth = copy_bandwidth(device, median_seconds)
        results = tune(device, median_seconds, *sizes)
    print(f"{device_name(device)}: copies run at {bandwidth / 1e12:.2f} TB/s")
    for program, (launch, seconds, before, rate) in results.items():
        print(
            f"{program:20} block {launch.block_v:5} warps {launch.num_warps:2}  "
            f"{1e6 * seconds:8.1f} us, now {1e6 * before:8.1f} us, {rate / bandwidth:.0%} of copy"
        )
    if arguments.write is not None:
        versions = {"torch": torch.__version__, "triton": triton.__version__}
        measured_on = {"gpu": device_name(device), **versions}
        write(results, family_of(device), measured_on, arguments.write)
        print(f"written to {arguments.write}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
