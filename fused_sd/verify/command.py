"""``fused_sd verify``: errors of every loss on this machine, and what the library promises of them.

Exit status: 0; 1 if a promise is broken; 2 for wrong use.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fused_sd.engine.out_of_memory import is_out_of_memory
from fused_sd.measuring.arguments import add_head_size
from fused_sd.measuring.dtypes import DTYPES
from fused_sd.measuring.environment import environment
from fused_sd.measuring.losses import add_losses
from fused_sd.measuring.markdown_block import Block
from fused_sd.verify import report
from fused_sd.verify.choices import DEFAULT_SIZES, QUICK_SIZES, Choices, resolve
from fused_sd.verify.promises import Measured
from fused_sd.verify.run import Verifier, verify

BLOCK = "measured"  # the block that ``--update`` fills


def add_verify(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command and its options."""
    command = commands.add_parser(
        "verify",
        help="measure every loss against float64 on this machine",
        description="Measure the errors of losses and gradients against float64, beside those of "
        "16-bit logits, and check what the library promises.  Exit status 1: a promise is broken.",
    )
    add = command.add_argument
    add_losses(command, "all")
    hidden, vocab = DEFAULT_SIZES
    add(
        "--quick",
        action="store_true",
        help="a look in seconds: one KL, and a head of {} x {}".format(*QUICK_SIZES),
    )
    add("--device", default="auto", help="auto, cpu or cuda (default auto)")
    add("--dtype", default="bf16", help=f"operands' dtype: {', '.join(DTYPES)} (default bf16)")
    add(
        "--tokens",
        type=int,
        default=32,
        help="number of tokens (default 32); errors do not depend on it",
    )
    add_head_size(command, f"hidden size (default {hidden})", f"vocabulary (default {vocab})")
    add("--backend", default="auto", help="auto, triton or torch (default auto)")
    add("--seed", type=int, default=0, help="seed of the operands (default 0)")
    output = command.add_mutually_exclusive_group()
    output.add_argument("--json", action="store_true", help="print JSON, with all digits")
    output.add_argument("--markdown", action="store_true", help="print the table in Markdown")
    output.add_argument(
        "--update",
        type=Path,
        metavar="PAGE",
        help="write the table below its marker in a Markdown file",
    )
    command.set_defaults(run=run_verify)


def run_verify(arguments: argparse.Namespace) -> int:
    """Measure the losses, print the results, and return the exit status."""
    block = None
    try:
        choices = resolve(arguments)
        if arguments.update is not None:
            block = Block(arguments.update, BLOCK)
    except ValueError as error:
        print(f"fused_sd verify: {error}", file=sys.stderr)
        return 2
    try:
        verifier = Verifier(choices)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        sizes = f"{choices.num_tokens} tokens x {choices.hidden_size} x {choices.vocab}"
        print(
            "fused_sd verify: --tokens, --hidden and --vocab must leave room for the operands, got "
            f"{sizes}; pass smaller ones",
            file=sys.stderr,
        )
        return 2
    setting = report.setting_lines(choices, verifier.top_logit, verifier.entropy)
    as_table = not (arguments.json or arguments.markdown or block)
    if as_table:
        print(*setting, *report.legend_lines(), *report.header_lines(), sep="\n", flush=True)
    measurements: list[Measured] = []
    broken: list[str] = []
    for measured, promises in verify(verifier):
        broken += promises
        if measured is not None:
            measurements.append(measured)
            if as_table:  # print each row as it comes: a large shape takes minutes
                print(report.row_line(report.cells(measured, choices.dtype)), flush=True)
    verdict = report.verdict_lines(len(choices.losses), broken)
    if as_table:
        print("", *verdict, sep="\n")
    elif arguments.json:
        print(json.dumps(as_json(choices, measurements, broken), indent=2))
    else:
        rows = [report.cells(measured, choices.dtype) for measured in measurements]
        table = [" ".join(setting), "", *report.markdown_lines(rows)]
        if block is None or broken:
            print(*table, "", *verdict, sep="\n")
        else:  # numbers are published only if every promise is kept
            block.fill(table)
    return 1 if broken else 0


def as_json(
    choices: Choices, measurements: Sequence[Measured], broken: Sequence[str]
) -> dict[str, Any]:
    """Return settings, measurements, broken promises and environment as plain values."""
    return {
        "ok": not broken,
        "broken": list(broken),
        "settings": {
            "losses": list(choices.losses),
            "kls": list(choices.kls),
            "device": str(choices.device),
            "dtype": choices.dtype_name,
            "backend": choices.backend,
            "tokens": choices.num_tokens,
            "hidden": choices.hidden_size,
            "vocab": choices.vocab,
            "seed": choices.seed,
        },
        "measurements": [
            {
                "loss": measured.name,
                "kl": measured.kl,
                "fused_sd": measured.fused._asdict(),
                "16-bit logits": measured.rounded._asdict(),
                "kept": None if measured.kept is None else measured.kept._asdict(),
            }
            for measured in measurements
        ],
        "environment": environment(),
    }
