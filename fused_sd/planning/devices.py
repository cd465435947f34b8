"""The device that a plan is for: its free memory, and the rates that times are predicted from."""

import os
from typing import NamedTuple

import torch

from fused_sd import checks
from fused_sd.engine import layout as chunking
from fused_sd.measuring.environment import default_device, device_name


class Card(NamedTuple):
    """Memory and rates of a GPU; None: unknown."""

    memory: float  # bytes, nominal
    rate: float | None  # FLOP/s of cuBLAS in 16 bits, at the shapes of an output head
    bandwidth: float | None = None  # bytes/s of a copy: reads and writes both count
    link: float | None = None  # bytes/s that NCCL sends from one GPU to the next


# Published rates and estimates, none of them measured by us.  GEMMs: the H200's from Liger's pull
# request 1356, (4096, 4096) x (4096, 128256) in bf16; the H100's is an estimate for such shapes,
# since others measured 798e12 at 8192 cubed; the others are round estimates.  Copies: nine tenths
# of the 4.8 TB/s in the H200's data sheet, and what others measured on an H100.  Link: NVLink 4
# without sums in the switches, according to an author of NCCL (nccl-tests, issue 212).
CARDS: dict[str, Card] = {
    "H200": Card(141e9, 690e12, 4.3e12, 370e9),
    "H100": Card(80e9, 650e12, 3.0e12, 370e9),
    "A100": Card(80e9, 250e12),
    "RTX 4090": Card(24e9, 160e12),
}
# seconds of a collective of any size: 8 H20 on NVLink 4 needed 12 to 17 us for 4 B to 4 KB
# (nccl-tests' output in DeepEP's issue 303); the rest is a guess at what starting one costs
LATENCY = 20e-6


class Rates(NamedTuple):
    """Rates that times are predicted from; None: unknown."""

    gemms: float | None  # FLOP/s
    copies: float | None  # bytes/s
    link: float | None  # bytes/s
    latency: float = LATENCY  # seconds a collective


class Device(NamedTuple):
    """The device that a plan is for."""

    name: str  # PyTorch's, or the known card's
    kind: str  # "cuda" or "cpu"
    free_bytes: int
    rates: Rates
    is_whole: bool  # whether the free bytes are the whole memory of a card


def find_device(
    device: str | torch.device | None,
    free_bytes: int | None,
    rate: float | None,
    link: float | None = None,
) -> Device:
    """Look up the device that the arguments of ``plan`` name.

    Args:
        device: a PyTorch device, whose free memory is read; a name of ``CARDS``, whose whole
            memory counts as free; None: the GPU if there is one, else the CPU.
        free_bytes: replaces the device's free memory.
        rate: FLOP/s of GEMMs; replaces the card's.
        link: bytes/s between two devices; replaces the card's.

    Raises:
        ValueError: the device is neither in this machine nor known, or a number is out of range.
    """
    if free_bytes is not None:
        checks.check_positive("free_bytes", free_bytes, "leave it out to ask the device")
    for name, value in (("rate", rate), ("link", link)):
        if value is not None:
            checks.check_positive(name, value, "leave it out for the known one")
    card = CARDS.get(device.upper()) if isinstance(device, str) else None
    if card is not None:
        known = int(card.memory if free_bytes is None else free_bytes)
        rates = _rates(card, rate, link)
        return Device(str(device).upper(), "cuda", known, rates, free_bytes is None)
    try:
        here = default_device() if device is None else torch.device(device)
    except RuntimeError:
        here = torch.device("meta")
    if here.type not in ("cuda", "cpu") or (here.type == "cuda" and not torch.cuda.is_available()):
        checks.fail(
            "device",
            f"be one that PyTorch sees here, or one of {', '.join(CARDS)}",
            repr(device),
            "pass a known card's name, or device='cuda' where there is one",
        )
    name = device_name(here)
    found = next((card for known, card in CARDS.items() if known in name), None)
    free = _free_bytes(here) if free_bytes is None else int(free_bytes)
    return Device(name, here.type, free, _rates(found, rate, link), False)


def _rates(card: Card | None, rate: float | None, link: float | None) -> Rates:
    if card is None:
        return Rates(rate, None, link)
    return Rates(rate or card.rate, card.bandwidth, link or card.link)


def _free_bytes(device: torch.device) -> int:
    """Bytes that can still be allocated."""
    if device.type == "cpu":
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return chunking.free_bytes(device)
