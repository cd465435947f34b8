"""``fused_sd bench``: time, memory and errors of a shape on this machine, beside other libraries'.

Exit status: 0; 1 if this library is wrong or fails, or nothing could be measured; 2 for wrong use.
"""

import argparse
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

import fused_sd
from fused_sd import checks
from fused_sd.bench.cell import Cell, measure_cell
from fused_sd.bench.measure import Effort, is_out_of_memory
from fused_sd.bench.problem import MEAN_KL, OBJECTIVES, Shape, make_problem, variant
from fused_sd.bench.providers import PROVIDERS
from fused_sd.bench.table import LEGEND, US, report_lines
from fused_sd.measuring.arguments import add_head_size, chosen_device, chosen_head_size
from fused_sd.measuring.dtypes import DTYPES
from fused_sd.measuring.environment import device_name, environment
from fused_sd.measuring.head_sizes import head_size

DEFAULT_OBJECTIVES = ("reverse_kl", "jsd")
LEAST_TOKENS, LEAST_HIDDEN, LEAST_VOCAB = 2, 4, 128  # SDPO compares 100 entries
BENCH_DTYPES = ("bf16", "fp32")  # an fp16 gradient needs a scaled loss, which no provider has here


@dataclass(frozen=True)
class Defaults:
    """Defaults with which a kind of device measures in about a minute."""

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

    objectives: tuple[str, ...]
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
    add(
        "--objectives",
        "--objective",
        default=",".join(DEFAULT_OBJECTIVES),
        metavar="A,B",
        help=f"all, or of {', '.join(OBJECTIVES)} (default {','.join(DEFAULT_OBJECTIVES)})",
    )
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
    objectives = tuple(name.strip() for name in arguments.objectives.split(","))
    for name in objectives:
        checks.check_one_of("--objectives", name, ("all", *OBJECTIVES))
    device = chosen_device(arguments.device)
    defaults = ON_GPU if device.type == "cuda" else ON_CPU
    hidden_size, vocab = chosen_head_size(arguments, defaults.sizes)
    tokens = defaults.tokens if arguments.tokens is None else arguments.tokens
    for option, value, least in (
        ("--tokens", tokens, LEAST_TOKENS),
        ("--hidden", hidden_size, LEAST_HIDDEN),
        ("--vocab", vocab, LEAST_VOCAB),
        ("--runs", 1 if arguments.runs is None else arguments.runs, 1),
    ):
        if value < least:
            checks.fail(option, f"be at least {least}", value, "leave it out for the default")
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
        OBJECTIVES if "all" in objectives else objectives,
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


def run_bench(arguments: argparse.Namespace) -> int:
    """Measure each objective, print its results, and return the exit status."""
    try:
        choices = resolve(arguments)
        source = make_problem(
            choices.shape,
            choices.tokens,
            dtype=DTYPES[choices.dtype],
            device=choices.device,
            kl=choices.kl,
            entropy=choices.entropy,
            seed=choices.seed,
        )
    except ValueError as error:
        print(f"fused_sd bench: {error}", file=sys.stderr)
        return 2
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
        where = f"{device_name(choices.device)}; fused_sd {fused_sd.__version__}"
        print(f"{where}, torch {torch.__version__}", *LEGEND, sep="\n", flush=True)
    cells = []
    for objective in choices.objectives:
        problem = variant(
            source,
            objective=objective,
            trainable=choices.trainable,
            mask_share=choices.mask_share,
        )
        cell = measure_cell(
            problem,
            source,
            PROVIDERS,
            choices.effort,
            floor_warm_seconds=choices.floor_warm_seconds,
            seed=choices.seed,
        )
        cells.append(cell)
        if not arguments.json:
            print("", *report_lines(cell), sep="\n", flush=True)
    if arguments.json:
        print(json.dumps(as_json(cells), indent=2))
    return 0 if all(map(_is_ours_ok, cells)) else 1


def as_json(cells: Sequence[Cell]) -> dict[str, Any]:
    """Return the results and the environment as plain values."""
    return {"cells": [cell.as_json() for cell in cells], "environment": environment()}


def _is_ours_ok(cell: Cell) -> bool:
    """Whether this library was right and could be timed."""
    return any(row.provider == US and row.status == "ok" for row in cell.rows)
