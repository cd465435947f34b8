"""Options that several commands have in common: the sizes of the head, and the device."""

import argparse
import os
from pathlib import Path

import torch

from fused_sd import checks
from fused_sd.measuring.environment import default_device
from fused_sd.measuring.head_sizes import MODELS, HeadSize, head_size

LARGEST_SIZE = 2**31 - 1  # of an axis that GEMMs take
LONGEST_NAME = 255  # bytes that file systems take


def add_head_size(
    command: argparse.ArgumentParser,
    hidden: str = "hidden size, instead of a model",
    vocab: str = "vocabulary, instead of a model",
) -> None:
    """Add ``--model``, and ``--hidden`` and ``--vocab`` with the given help."""
    command.add_argument(
        "--model",
        help="a config.json or its folder, or a model in transformers' cache or on the hub; known "
        f"without either: {', '.join(MODELS)}",
    )
    command.add_argument("--hidden", type=int, help=hidden)
    command.add_argument("--vocab", type=int, help=vocab)


def chosen_head_size(arguments: argparse.Namespace, default: tuple[int, int]) -> HeadSize:
    """Return the model's sizes, or those given; what is not given is the default's.

    Raises:
        ValueError: the model is unknown, or comes with a size.
    """
    hidden, vocab = arguments.hidden, arguments.vocab
    if arguments.model is not None:
        return head_size(arguments.model, hidden, vocab)
    return HeadSize(
        default[0] if hidden is None else hidden, default[1] if vocab is None else vocab
    )


def check_count(option: str, value: int, least: int, most: int = LARGEST_SIZE) -> None:
    """Refuse a number of tokens, rows or runs that is too small, or that nothing could hold."""
    if value < least:
        checks.fail(option, f"be at least {least}", value, "leave it out for the default")
    if value > most:
        checks.fail(option, f"be at most {most}", value, "leave it out for the default")


def check_file(option: str, path: Path) -> None:
    """Refuse what cannot be the name of a new file, or of one to write over."""
    named = os.path.isdir(path.parent) and not os.path.isdir(path) and "\0" not in path.name
    if not named or len(os.fsencode(path.name)) > LONGEST_NAME:
        rule = "be a file in a folder that there is"
        checks.fail(option, rule, repr(str(path)), "make the folder, or choose another name")


def chosen_device(name: str) -> torch.device:
    """Return the device that ``--device`` names: "auto", "cpu" or "cuda".

    Raises:
        ValueError: there is no such device.
    """
    checks.check_one_of("--device", name, ("auto", "cpu", "cuda"))
    if name == "cuda" and not torch.cuda.is_available():
        checks.fail(
            "--device",
            "be 'auto' or 'cpu' where PyTorch sees no GPU",
            "'cuda'",
            "choose one of them, or see `fused_sd env` for PyTorch's CUDA build",
        )
    return default_device() if name == "auto" else torch.device(name)
