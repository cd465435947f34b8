"""``fused_sd bench``: time, memory and errors of a shape on this machine, beside other libraries'.

Exit status: 0; 1 if this library is wrong or fails, or nothing could be measured; 2 for wrong use.
"""

import argparse
import json
import math
import sys
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

import fused_sd
from fused_sd import checks
from fused_sd.bench.cell import Cell
from fused_sd.bench.measure import Effort
from fused_sd.bench.problem import MEAN_KL, OBJECTIVE_OF, Shape, make_problem, variant
from fused_sd.bench.progress import (
    Progress,
    Work,
    duration,
    expected_seconds,
    gemm_rate,
    runs_here,
)
from fused_sd.bench.providers import PROVIDERS
from fused_sd.bench.rounds import measure_cell
from fused_sd.bench.table import LEGEND, LINE, US, report_lines
from fused_sd.engine.out_of_memory import is_out_of_memory
from fused_sd.measuring.arguments import (
    add_head_size,
    check_count,
    chosen_device,
    chosen_head_size,
)
from fused_sd.measuring.dtypes import DTYPES
from fused_sd.measuring.environment import device_name, environment
from fused_sd.measuring.head_sizes import head_size
from fused_sd.measuring.losses import LOSSES, add_losses, loss_names

DEFAULT_LOSSES = "sdpo,gkd"
LEAST_TOKENS, LEAST_HIDDEN, LEAST_VOCAB = 2, 4, 128  # SDPO compares 100 entries
MOST_RUNS = 10_000
BENCH_DTYPES = ("bf16", "fp32")  # an fp16 gradient needs a scaled loss, which no provider has here


@dataclass(frozen=True)
class Defaults:
    """Defaults with which a kind of device measures in a few minutes."""

    sizes: tuple[int, int]
    tokens: int
    dtype: str
    effort: Effort
    floor_warm_seconds: float


ON_GPU = Defaults(head_size("qwen3-8b"), 4096, "bf16", Effort(0.5, 20, 10.0, 5), 2.0)
ON_CPU = Defaults((256, 32000), 256, "fp32", Effort(0.2, 5, 10.0, 2), 0.0)


@dataclass(frozen=True)
class Choices:
    """What is measured, and how long."""

    titles: dict[str, str]  # of each objective: the losses that it times
    shape: Shape
    tokens: int
    dtype: str
    device: torch.device
    trainable: bool
    mask_share: float
    kl: float
    entropy: float | None
    effort: Effort
    floor_warm_seconds: float
    seed: int


def add_bench(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command and its options."""
    command = commands.add_parser(
        "bench",
        help="time, memory and errors of your shape here, against eager and installed peers",
        description="Time, peak memory and errors of forward and backward, of this library, eager "
        "and compiled PyTorch and every installed peer, on your shape.  Each is compared with "
        "float64 before it is timed.  Exit status 1: this library is wrong or could not run.",
    )
    add = command.add_argument
    add_head_size(
        command,
        "hidden size (default: Qwen3-8B's on a GPU, 256 on a CPU)",
        "vocabulary (default: Qwen3-8B's on a GPU, 32000 on a CPU)",
    )
    add("--tokens", type=int, help="tokens of a batch (default 4096 on a GPU, 256 on a CPU)")
    add_losses(command, DEFAULT_LOSSES)
    add("--frozen", action="store_true", help="the head has no gradient")
    add("--mask", type=float, default=0.0, help="share of tokens that do not count (default 0)")
    add("--kl", type=float, default=MEAN_KL, help=f"mean KL(t||s) in nat (default {MEAN_KL})")
    add("--entropy", type=float, help="student's mean, in nat (default: 0.6 to 1, as drawn)")
    add("--dtype", help=f"{' or '.join(BENCH_DTYPES)} (default bf16 on a GPU, fp32 on a CPU)")
    add("--device", default="auto", help="auto, cpu or cuda (default auto)")
    add("--runs", type=int, help="timed runs (default 20 on a GPU, 5 on a CPU)")
    add("--seed", type=int, default=0, help="seed of operands and order (default 0)")
    add("--json", action="store_true", help="print JSON, with all digits")
    command.set_defaults(run=run_bench)


def resolve(arguments: argparse.Namespace) -> Choices:
    """Turn the command line's arguments into choices.

    Raises:
        ValueError: an argument is out of range or unknown.
    """
    losses = loss_names("--losses", arguments.losses)
    device = chosen_device(arguments.device)
    defaults = ON_GPU if device.type == "cuda" else ON_CPU
    hidden_size, vocab = chosen_head_size(arguments, defaults.sizes)
    tokens = defaults.tokens if arguments.tokens is None else arguments.tokens
    for option, value, least in (
        ("--tokens", tokens, LEAST_TOKENS),
        ("--hidden", hidden_size, LEAST_HIDDEN),
        ("--vocab", vocab, LEAST_VOCAB),
    ):
        check_count(option, value, least)
    if arguments.runs is not None:
        check_count("--runs", arguments.runs, 1, MOST_RUNS)
    checks.check_int_size("--seed", arguments.seed)
    if not 0 <= arguments.mask < 1 or round(arguments.mask * tokens) >= tokens:
        checks.fail("--mask", "leave a token that counts", arguments.mask, "pass 0.5 for half")
    if not 1e-4 <= arguments.kl <= 1:
        checks.fail("--kl", "lie in [1e-4, 1]", arguments.kl, "real ones are 0.001 to 0.1 nat")
    dtype = defaults.dtype if arguments.dtype is None else arguments.dtype
    checks.check_one_of("--dtype", dtype, BENCH_DTYPES)
    most = math.log(vocab) / 2  # flatter than the distributions of any policy
    if arguments.entropy is not None and not 0.05 <= arguments.entropy <= most:
        checks.fail(
            "--entropy", f"lie in [0.05, {most:.1f}]", arguments.entropy, "real ones are 0.2 to 2"
        )
    effort = defaults.effort
    if arguments.runs is not None:
        effort = Effort(effort.warm_seconds, arguments.runs)
    return Choices(
        titles_of(losses),
        Shape(arguments.model or "your head", hidden_size, vocab),
        tokens,
        dtype,
        device,
        not arguments.frozen,
        arguments.mask,
        arguments.kl,
        arguments.entropy,
        effort,
        defaults.floor_warm_seconds,
        arguments.seed,
    )


def titles_of(losses: Sequence[str]) -> dict[str, str]:
    """Return the objectives that time these losses, each with the names of its losses.

    Losses whose arithmetic with the vocabulary is the same are timed once.
    """
    named: dict[str, list[str]] = {}
    for loss in losses:
        named.setdefault(OBJECTIVE_OF[loss], []).append(loss)
    return {
        objective: ", ".join(names)
        + (f" (timed as {objective})" if objective in LOSSES and objective not in names else "")
        for objective, names in named.items()
    }


def run_bench(arguments: argparse.Namespace) -> int:
    """Measure each loss, print its results, and return the exit status."""
    try:
        choices = resolve(arguments)
    except ValueError as error:
        print(f"fused_sd bench: {error}", file=sys.stderr)
        return 2
    expected = expected_by_title(choices)
    # what will run, before anything that takes long; JSON is alone on the standard output
    print(*plan_lines(choices, expected), sep="\n", file=sys.stderr if arguments.json else None)
    sys.stdout.flush()
    progress = Progress(sys.stderr, expected)
    progress.begin(next(iter(expected)))
    progress.say("drawing the operands", None)
    try:
        source = make_problem(
            choices.shape,
            choices.tokens,
            dtype=DTYPES[choices.dtype],
            device=choices.device,
            kl=choices.kl,
            entropy=choices.entropy,
            seed=choices.seed,
        )
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        print(
            "fused_sd bench: --tokens, --hidden and --vocab must leave room for the operands, got "
            f"{choices.tokens}, {choices.shape.hidden_size} and {choices.shape.vocab}; pass fewer "
            "tokens or a smaller model",
            file=sys.stderr,
        )
        return 2
    if not arguments.json:
        print("", *LEGEND, sep="\n", flush=True)
    cells = []
    for objective, title in choices.titles.items():
        progress.begin(title)
        cell = measure_cell(
            variant(
                source,
                objective=objective,
                trainable=choices.trainable,
                mask_share=choices.mask_share,
            ),
            source,
            PROVIDERS,
            choices.effort,
            floor_warm_seconds=choices.floor_warm_seconds,
            seed=choices.seed,
            say=progress.say,
        )
        progress.end()
        cells.append(cell)
        if not arguments.json:
            print("", *report_lines(cell, title), sep="\n", flush=True)
    if arguments.json:
        print(json.dumps(as_json(choices, cells), indent=2))
    return 0 if all(map(_is_ours_ok, cells)) else 1


def expected_by_title(choices: Choices) -> dict[str, float]:
    """Return about how many seconds each cell takes, by its title."""
    counted = choices.tokens * (1 - choices.mask_share)
    flop = 2.0 * counted * choices.shape.hidden_size * choices.shape.vocab
    rate = gemm_rate(choices.shape.hidden_size, DTYPES[choices.dtype], choices.device)
    here = [provider for provider in PROVIDERS if runs_here(provider, choices.device)]
    return {
        title: expected_seconds(
            Work(objective, choices.trainable, flop, choices.effort), here, rate
        )
        for objective, title in choices.titles.items()
    }


def plan_lines(choices: Choices, expected: Mapping[str, float]) -> list[str]:
    """Return the lines that say what will run, and about how long it takes."""
    runs: list[str] = []
    absent: list[str] = []
    for provider in PROVIDERS:
        if not provider.objectives.isdisjoint(choices.titles):
            (runs if runs_here(provider, choices.device) else absent).append(provider.name)
    shape = choices.shape
    where = f"{device_name(choices.device)}; fused_sd {fused_sd.__version__}"
    lines = [
        f"{where}, torch {torch.__version__}",
        f"{', '.join(choices.titles.values())}: {choices.tokens} tokens x {shape.hidden_size} x "
        f"{shape.vocab}, {choices.dtype}; about {duration(sum(expected.values()))}",
        *textwrap.wrap(f"compared: {'; '.join(runs)}", LINE),
    ]
    if absent:
        lines += textwrap.wrap(f"not here: {'; '.join(absent)}", LINE)
    return lines


def as_json(choices: Choices, cells: Sequence[Cell]) -> dict[str, Any]:
    """Return the results, with the losses that each times, and the environment as plain values."""
    named = [{"losses": choices.titles[cell.objective]} | cell.as_json() for cell in cells]
    return {"cells": named, "environment": environment()}


def _is_ours_ok(cell: Cell) -> bool:
    """Whether this library was right and could be timed."""
    return any(row.provider == US and row.status == "ok" for row in cell.rows)
