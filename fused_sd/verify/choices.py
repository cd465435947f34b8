"""What ``fused_sd verify`` can be asked for, and what is said of anything else."""

import argparse
from dataclasses import dataclass

import torch

from fused_sd import checks
from fused_sd.measuring.dtypes import DTYPES
from fused_sd.measuring.environment import chosen_backend, default_device
from fused_sd.measuring.head_sizes import head_size
from fused_sd.verify.cases import CASES

DEFAULT_SIZES = (128, 32000)
MIN_TOKENS, MIN_HIDDEN, MIN_VOCAB = 2, 4, 32  # one token is masked; rows come in clusters


@dataclass(frozen=True)
class Choices:
    """What is to be verified, and where."""

    losses: tuple[str, ...]
    device: torch.device
    dtype_name: str
    backend: str  # "triton" or "torch", no longer "auto"
    num_tokens: int
    hidden_size: int
    vocab: int
    seed: int

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.dtype_name]


def resolve(arguments: argparse.Namespace) -> Choices:
    """The choices that the command line's arguments mean.

    Raises:
        ValueError: when one of them means nothing; the message says what to do.
    """
    losses = tuple(CASES)
    if arguments.losses != "all":
        losses = tuple(name.strip() for name in arguments.losses.split(","))
    for name in losses:
        checks.check_one_of("--losses", name, ("all", *CASES))
    checks.check_one_of("--dtype", arguments.dtype, DTYPES)
    checks.check_one_of("--backend", arguments.backend, ("auto", "triton", "torch"))
    device = resolve_device(arguments.device)
    hidden_size, vocab = resolve_sizes(arguments, DEFAULT_SIZES)
    for name, value, least in (
        ("--tokens", arguments.tokens, MIN_TOKENS),
        ("--hidden", hidden_size, MIN_HIDDEN),
        ("--vocab", vocab, MIN_VOCAB),
    ):
        if value < least:
            checks.fail(name, f"be at least {least}", value, "leave it out for the default")
    return Choices(
        losses,
        device,
        arguments.dtype,
        chosen_backend(arguments.backend, device, DTYPES[arguments.dtype]),
        arguments.tokens,
        hidden_size,
        vocab,
        arguments.seed,
    )


def resolve_device(name: str) -> torch.device:
    """The device that --device means."""
    checks.check_one_of("--device", name, ("auto", "cpu", "cuda"))
    if name == "cuda" and not torch.cuda.is_available():
        checks.fail(
            "--device",
            "be 'auto' or 'cpu' where PyTorch sees no GPU",
            "'cuda'",
            "choose one of them, or see `fused_sd env` for PyTorch's CUDA build",
        )
    return default_device() if name == "auto" else torch.device(name)


def resolve_sizes(arguments: argparse.Namespace, default: tuple[int, int]) -> tuple[int, int]:
    """Hidden size and vocabulary: given, a model's, or the defaults."""
    given = (arguments.hidden, arguments.vocab)
    sizes = default
    if arguments.model is not None:
        sizes = head_size(arguments.model)
        if given != (None, None):
            checks.fail(
                "--model",
                "come without --hidden and --vocab, which it sets",
                arguments.model,
                "leave out one or the other",
            )
    hidden_size, vocab = (
        size if got is None else got for size, got in zip(sizes, given, strict=True)
    )
    return hidden_size, vocab
