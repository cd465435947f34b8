"""The command line of the library.

``fused_sd env``      versions and devices, for bug reports, and whether the versions were tried
``fused_sd verify``   errors of every loss on this machine, and whether the promises are kept
``fused_sd bench``    time, memory and errors of a shape on this machine, beside other libraries'
``fused_sd plan``     memory, chunk size and time of a loss, without running it
``fused_sd credit``   what a teacher says of each token

Exit status: 0; 1 if a promise is broken; 2 for wrong use, with a message that says what to do; 141
if who reads the output, such as ``head``, has closed it.
"""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import fused_sd
from fused_sd.bench.command import add_bench
from fused_sd.credit import VALUES, CreditMap, print_map, save_html, save_png
from fused_sd.measuring import tried
from fused_sd.measuring.arguments import check_file
from fused_sd.measuring.environment import ABSENT, environment, environment_text
from fused_sd.planning.command import add_plan
from fused_sd.verify.command import add_verify

CLOSED_PIPE = 128 + 13  # what a shell reports of a command that SIGPIPE ended


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit status."""
    try:
        try:
            arguments = build_parser().parse_args(argv)
            status: int = arguments.run(arguments)
        finally:
            sys.stdout.flush()  # also what ``--help`` printed, so that a closed pipe is met here
    except BrokenPipeError:
        # what is still buffered is written when Python ends, to where nobody is missing
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return CLOSED_PIPE
    return status


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of all commands."""
    parser = argparse.ArgumentParser(prog="fused_sd", description=fused_sd.__doc__)
    parser.add_argument("--version", action="version", version=f"fused_sd {fused_sd.__version__}")
    commands = parser.add_subparsers(required=True, metavar="command")
    env = commands.add_parser("env", help="print versions and devices, for bug reports")
    env.add_argument("--json", action="store_true", help="print JSON")
    env.set_defaults(run=run_env)
    add_verify(commands)
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
    """Print the environment, and whether its versions were tried together."""
    facts = environment()
    versions = {name: facts[name] for name in ("python", *tried.PACKAGES)}
    there = {name: version for name, version in versions.items() if version != ABSENT}
    facts["versions tried"] = tried.verdict(there, tried.load())
    print(json.dumps(facts, indent=2) if arguments.json else environment_text(facts))
    return 0


def run_credit(arguments: argparse.Namespace) -> int:
    """Print a credit map, or write it as HTML or PNG."""
    try:
        shown = CreditMap.from_json(arguments.map.read_text(encoding="utf-8"))
        if arguments.html is not None:
            check_file("--html", arguments.html)
            save_html(shown, arguments.html, value=arguments.value)
        if arguments.png is not None:
            check_file("--png", arguments.png)
            save_png(shown, arguments.png, value=arguments.value)
        if arguments.html is None and arguments.png is None:
            print_map(shown, value=arguments.value)
    except (ValueError, OSError, ImportError) as error:
        print(f"fused_sd credit: {error}", file=sys.stderr)
        return 2
    return 0
