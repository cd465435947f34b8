"""``fused_sd plan``: memory, chunk size and time of a loss, as a table or as JSON.

Exit status: 0; 2 for wrong use.
"""

import argparse
import json
import sys

from fused_sd import checks
from fused_sd.measuring.arguments import add_head_size
from fused_sd.measuring.losses import add_losses, loss_names
from fused_sd.measuring.text import size_text
from fused_sd.planning.checking import PLANNED_DTYPES
from fused_sd.planning.devices import CARDS
from fused_sd.planning.objectives import (
    DIVERGENCE_FORMS,
    GENERIC,
    SUPPORT_FORMS,
    parse_divergence,
    parse_support,
)
from fused_sd.planning.plan import plan
from fused_sd.planning.result import Plan

SUFFIXES = {"": 1, "B": 1, "KB": 1e3, "MB": 1e6, "GB": 1e9, "MIB": 2**20, "GIB": 2**30}


def add_plan(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command and its options."""
    command = commands.add_parser(
        "plan",
        help="memory, chunk size and time of a loss, without running it",
        description="Peak memory, chunk size, expected time and the longest batch that fits, of "
        "this library and of eager PyTorch, without running either.",
    )
    add = command.add_argument
    add_head_size(command)
    add("--tokens", type=int, required=True, help="tokens of the whole batch, over all ranks")
    add("--teacher", help="a model with another head (default: the student's)")
    add("--own-teacher-head", action="store_true", help="the teacher has its own copy of the head")
    add_losses(command, "sdpo", GENERIC)
    add("--divergence", help=DIVERGENCE_FORMS)
    add("--support", help=SUPPORT_FORMS)
    add("--remainder", help="tail, renormalize, drop or teacher_renormalize")
    add("--dtype", default="bf16", help=f"{', '.join(PLANNED_DTYPES)} (default bf16)")
    add("--frozen", action="store_true", help="the head has no gradient")
    add("--reduction", default="mean", help="mean, sum or none (default mean)")
    add("--gradient", default="dense", help="dense, sparse or auto (default dense)")
    add(
        "--kept",
        type=int,
        metavar="ENTRIES",
        help="entries that a token's sparse gradient keeps (default 64)",
    )
    add(
        "--dense-share",
        type=float,
        metavar="SHARE",
        help="share of tokens whose gradient is dense under --gradient sparse or auto (default 0)",
    )
    add(
        "--mask",
        type=float,
        default=0.0,
        metavar="SHARE",
        help="share of tokens with weight 0 (default 0)",
    )
    add("--tensor-parallel", type=int, default=1, help="ranks that share the head (default 1)")
    add("--world-size", type=int, help="all ranks (default: those that share the head)")
    add("--device", help=f"cuda, cpu or a card: {', '.join(CARDS)} (default: this machine's)")
    add(
        "--free",
        metavar="BYTES",
        help="memory that model and optimizer leave free, as 60GB or 56GiB (default: the device's)",
    )
    add("--rate", type=float, metavar="TFLOP/S", help="of the device's GEMMs, where unknown")
    add("--link", type=float, metavar="GB/S", help="of collectives between devices, where unknown")
    add("--chunk", type=int, metavar="TOKENS", help="chunk_size (default: chosen by memory)")
    add("--parts", action="store_true", help="print all parts of each peak")
    add("--json", action="store_true", help="print JSON, in bytes and seconds")
    command.set_defaults(run=run_plan)


def run_plan(arguments: argparse.Namespace) -> int:
    """Plan, print the table or JSON, and return the exit status."""
    try:
        losses = loss_names("--losses", arguments.losses, GENERIC)
        plans = [planned(arguments, loss) for loss in losses]
    except ValueError as error:
        print(f"fused_sd plan: {error}", file=sys.stderr)
        return 2
    if arguments.json:
        facts = [each.as_dict() for each in plans]
        print(json.dumps(facts[0] if len(facts) == 1 else facts, indent=2))
        return 0
    for number, each in enumerate(plans):
        print(*([""] if number else []), each, sep="\n")
        for estimate in each.estimates if arguments.parts else ():
            print(f"\n{estimate.provider} ({estimate.source})")
            for name, size in sorted(estimate.parts.items(), key=lambda part: -part[1]):
                print(f"  {size_text(size):>10}  {name}")
    return 0


def planned(arguments: argparse.Namespace, loss: str) -> Plan:
    """Plan one of the losses that the command line names.

    Raises:
        ValueError: an argument is out of range, or names nothing that is known.
    """
    return plan(
        arguments.model,
        tokens=arguments.tokens,
        hidden_size=arguments.hidden,
        vocab=arguments.vocab,
        teacher=arguments.teacher,
        shared_head=False if arguments.own_teacher_head else None,
        objective=loss,
        divergence=None if arguments.divergence is None else parse_divergence(arguments.divergence),
        support=None if arguments.support is None else parse_support(arguments.support),
        remainder=arguments.remainder,
        dtype=arguments.dtype,
        train_head=not arguments.frozen,
        reduction=arguments.reduction,
        gradient=arguments.gradient,
        kept=arguments.kept,
        dense_share=arguments.dense_share,
        masked=arguments.mask,
        tensor_parallel=arguments.tensor_parallel,
        world_size=arguments.world_size,
        device=arguments.device,
        free_bytes=None if arguments.free is None else parse_bytes(arguments.free),
        rate=None if arguments.rate is None else 1e12 * arguments.rate,
        link=None if arguments.link is None else 1e9 * arguments.link,
        chunk_size=arguments.chunk,
    )


def parse_bytes(text: str) -> int:
    """Parse a number of bytes with or without a unit: "2e10", "60GB", "56GiB"."""
    number = text.rstrip("BbGgMmKkIi ")
    unit = text[len(number) :].strip().upper()
    try:
        return int(float(number) * SUFFIXES[unit])
    except (KeyError, ValueError, OverflowError):  # the last of inf
        checks.fail("--free", "be a number of bytes", repr(text), "write 60GB or 56GiB")
        raise
