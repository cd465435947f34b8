"""The settings of a verification, and the checks of the command line's arguments."""

import argparse
from dataclasses import dataclass

import torch

from fused_sd import checks
from fused_sd.measuring.arguments import check_count, chosen_device, chosen_head_size
from fused_sd.measuring.dtypes import DTYPES
from fused_sd.measuring.environment import chosen_backend
from fused_sd.measuring.losses import loss_names

DEFAULT_SIZES = (128, 32000)  # hidden size and vocabulary
DEFAULT_KLS = (1e-5, 1e-3, 1e-1)
# with ``--quick``: the same losses and promises, in a few seconds on two cores
QUICK_SIZES, QUICK_KLS = (64, 8192), (1e-3,)
MIN_TOKENS, MIN_HIDDEN, MIN_VOCAB = 2, 4, 32  # one token is masked; the head's rows lie in clusters


@dataclass(frozen=True)
class Choices:
    """What is verified, and on which device."""

    losses: tuple[str, ...]
    kls: tuple[float, ...]
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
    losses = loss_names("--losses", arguments.losses)
    checks.check_one_of("--dtype", arguments.dtype, DTYPES)
    checks.check_one_of("--backend", arguments.backend, ("auto", "triton", "torch"))
    device = chosen_device(arguments.device)
    sizes, kls = (QUICK_SIZES, QUICK_KLS) if arguments.quick else (DEFAULT_SIZES, DEFAULT_KLS)
    hidden_size, vocab = chosen_head_size(arguments, sizes)
    for name, value, least in (
        ("--tokens", arguments.tokens, MIN_TOKENS),
        ("--hidden", hidden_size, MIN_HIDDEN),
        ("--vocab", vocab, MIN_VOCAB),
    ):
        check_count(name, value, least)
    checks.check_int_size("--seed", arguments.seed)
    return Choices(
        losses,
        kls,
        device,
        arguments.dtype,
        chosen_backend(arguments.backend, device, DTYPES[arguments.dtype]),
        arguments.tokens,
        hidden_size,
        vocab,
        arguments.seed,
    )
