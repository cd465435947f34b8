"""The settings of a verification, and the checks of the command line's arguments."""

import argparse
from dataclasses import dataclass

import torch

from fused_sd import checks
from fused_sd.measuring.arguments import chosen_device, chosen_head_size
from fused_sd.measuring.dtypes import DTYPES
from fused_sd.measuring.environment import chosen_backend
from fused_sd.verify.cases import CASES

DEFAULT_SIZES = (128, 32000)  # hidden size and vocabulary
MIN_TOKENS, MIN_HIDDEN, MIN_VOCAB = 2, 4, 32  # one token is masked; the head's rows lie in clusters


@dataclass(frozen=True)
class Choices:
    """What is verified, and on which device."""

    losses: tuple[str, ...]
    device: torch.device
    dtype_name: str
    backend: str  # "triton" or "torch"; "auto" is resolved
    num_tokens: int
    hidden_size: int
    vocab: int
    seed: int

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of hidden states and head."""
        return DTYPES[self.dtype_name]


def resolve(arguments: argparse.Namespace) -> Choices:
    """Turn the command line's arguments into choices.

    Raises:
        ValueError: an argument is out of range or unknown.
    """
    losses = tuple(CASES)
    if arguments.losses != "all":
        losses = tuple(name.strip() for name in arguments.losses.split(","))
    for name in losses:
        checks.check_one_of("--losses", name, ("all", *CASES))
    checks.check_one_of("--dtype", arguments.dtype, DTYPES)
    checks.check_one_of("--backend", arguments.backend, ("auto", "triton", "torch"))
    device = chosen_device(arguments.device)
    hidden_size, vocab = chosen_head_size(arguments, DEFAULT_SIZES)
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
