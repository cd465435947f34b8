"""The command line: ``fused_sd env`` for bug reports, ``fused_sd verify`` for the promises,
``fused_sd bench`` for speed and memory, ``fused_sd plan`` for memory and time beforehand,
``fused_sd credit`` to look at what a teacher says of each token.

Exit status: 0; 1 when a promise is broken; 2 for wrong use, with a message that says what to do.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import fused_sd
from fused_sd.bench.command import add_bench
from fused_sd.credit import VALUES, CreditMap, print_map, save_html, save_png
from fused_sd.measuring.dtypes import DTYPES
from fused_sd.measuring.environment import environment, environment_text
from fused_sd.measuring.head_sizes import MODEL_HELP
from fused_sd.planning.command import add_plan
from fused_sd.verify import report
from fused_sd.verify.cases import CASES
from fused_sd.verify.choices import DEFAULT_SIZES, Choices, resolve
from fused_sd.verify.promises import Measured
from fused_sd.verify.run import Verifier, verify


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns its exit status."""
    arguments = build_parser().parse_args(argv)
    status: int = arguments.run(arguments)
    return status


def build_parser() -> argparse.ArgumentParser:
    """The commands and their options."""
    parser = argparse.ArgumentParser(prog="fused_sd", description=fused_sd.__doc__)
    parser.add_argument("--version", action="version", version=f"fused_sd {fused_sd.__version__}")
    commands = parser.add_subparsers(required=True, metavar="command")
    env = commands.add_parser("env", help="print versions and devices, for bug reports")
    env.add_argument("--json", action="store_true", help="print JSON")
    env.set_defaults(run=run_env)

    command = commands.add_parser(
        "verify",
        help="measure every loss against float64 on this machine",
        description="Measure the errors of losses and gradients against float64, beside those of "
        "16-bit logits, and check what the library promises.  Exit status 1: a promise is broken.",
    )
    add = command.add_argument
    add("--losses", default="all", metavar="A,B", help=f"of {', '.join(CASES)} (default all)")
    add("--device", default="auto", help="auto, cpu or cuda (default auto)")
    add("--dtype", default="bf16", help=f"of the operands: {', '.join(DTYPES)} (default bf16)")
    add("--tokens", type=int, default=32, help="default 32; errors do not depend on it")
    add("--hidden", type=int, help=f"hidden size (default {DEFAULT_SIZES[0]})")
    add("--vocab", type=int, help=f"vocabulary (default {DEFAULT_SIZES[1]})")
    add("--model", help=MODEL_HELP)
    add("--backend", default="auto", help="auto, triton or torch (default auto)")
    add("--seed", type=int, default=0, help="of the operands (default 0)")
    output = command.add_mutually_exclusive_group()
    output.add_argument("--json", action="store_true", help="print JSON, with all digits")
    output.add_argument("--markdown", action="store_true", help="print the table in Markdown")
    output.add_argument(
        "--update-readme",
        nargs="?",
        const=Path("README.md"),
        type=Path,
        metavar="PATH",
        help="write the table below its marker in a file (default README.md)",
    )
    command.set_defaults(run=run_verify)

    add_bench(commands)
    add_plan(commands)

    credit = commands.add_parser("credit", help="show a credit map in the terminal, HTML or PNG")
    credit.add_argument("map", type=Path, metavar="MAP.json", help="written by CreditMap.to_json")
    credit.add_argument("--value", default="delta", help=f"{', '.join(VALUES)} (default delta)")
    credit.add_argument("--html", type=Path, metavar="PATH", help="write a page instead")
    credit.add_argument("--png", type=Path, metavar="PATH", help="write a picture instead")
    credit.set_defaults(run=run_credit)
    return parser


def run_env(arguments: argparse.Namespace) -> int:
    """Print the environment."""
    facts = environment()
    print(json.dumps(facts, indent=2) if arguments.json else environment_text(facts))
    return 0


def run_credit(arguments: argparse.Namespace) -> int:
    """Show a credit map."""
    try:
        shown = CreditMap.from_json(arguments.map.read_text(encoding="utf-8"))
        if arguments.html is not None:
            save_html(shown, arguments.html, value=arguments.value)
        if arguments.png is not None:
            save_png(shown, arguments.png, value=arguments.value)
        if arguments.html is None and arguments.png is None:
            print_map(shown, value=arguments.value)
    except (ValueError, OSError, ImportError) as error:
        print(f"fused_sd credit: {error}", file=sys.stderr)
        return 2
    return 0


def run_verify(arguments: argparse.Namespace) -> int:
    """Measure, print, judge."""
    try:
        choices = resolve(arguments)
        if arguments.update_readme is not None:
            report.check_readme(arguments.update_readme)
    except ValueError as error:
        print(f"fused_sd verify: {error}", file=sys.stderr)
        return 2
    verifier = Verifier(
        choices.num_tokens,
        choices.hidden_size,
        choices.vocab,
        choices.dtype,
        choices.device,
        choices.backend,
        choices.seed,
    )
    setting = report.setting_lines(choices, verifier.top_logit, verifier.entropy)
    as_table = not (arguments.json or arguments.markdown or arguments.update_readme)
    if as_table:
        print(*setting, *report.legend_lines(), *report.header_lines(), sep="\n", flush=True)
    measurements: list[Measured] = []
    broken: list[str] = []
    for measured, promises in verify(verifier, choices.losses):
        broken += promises
        if measured is not None:
            measurements.append(measured)
            if as_table:  # as they come: a large shape takes minutes
                print(report.row_line(report.cells(measured, choices.dtype)), flush=True)
    verdict = report.verdict_lines(len(choices.losses), broken)
    if as_table:
        print("", *verdict, sep="\n")
    elif arguments.json:
        print(json.dumps(as_json(choices, measurements, broken), indent=2))
    else:
        rows = [report.cells(measured, choices.dtype) for measured in measurements]
        table = [" ".join(setting), "", *report.markdown_lines(rows)]
        if arguments.update_readme is None or broken:
            print(*table, "", *verdict, sep="\n")
        else:  # a number is published only under kept promises
            report.update_readme(arguments.update_readme, table)
    return 1 if broken else 0


def as_json(
    choices: Choices, measurements: Sequence[Measured], broken: Sequence[str]
) -> dict[str, Any]:
    """Everything that was chosen, measured and found, with all digits."""
    return {
        "ok": not broken,
        "broken": list(broken),
        "settings": {
            "losses": list(choices.losses),
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
