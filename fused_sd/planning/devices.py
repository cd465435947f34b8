"""The device a run is planned for: its memory, and the rates that its time is predicted from."""

import os
from typing import NamedTuple

import torch

from fused_sd import checks
from fused_sd.engine import layout as chunking
from fused_sd.measuring.environment import default_device, device_name


class Card(NamedTuple):
    """What is known of a GPU by its name."""

    memory: float  # bytes, nominal
    rate: float | None  # FLOP/s that cuBLAS sustains in 16 bits at the shapes of an output head
    bandwidth: float | None = None  # bytes/s that a copy moves, reads and writes counted
    link: float | None = None  # bytes/s that NCCL sends from one GPU to the next


# None was measured here.  GEMMs: H200 as published by Liger in its pull request 1356,
# (4096, 4096) x (4096, 128256) in bf16; the others are round estimates.  Copies: a planning rate,
# nine tenths of the 4.8 TB/s of the data sheet.  Link: what an author of NCCL says that it gets of
# NVLink 4 without the switches' own sums (nccl-tests, issue 212)
CARDS: dict[str, Card] = {
    "H200": Card(141e9, 690e12, 4.3e12, 370e9),
    "H100": Card(80e9, None, None, 370e9),
    "A100": Card(80e9, 250e12),
    "RTX 4090": Card(24e9, 160e12),
}
# seconds that a collective takes whatever its size: 8 H20 on NVLink 4 needed 12 to 17 us for 4 B
# to 4 KB (nccl-tests' output in DeepEP's issue 303); the rest is a guess at what starting one costs
LATENCY = 20e-6


class Rates(NamedTuple):
    """What a time is predicted from; None: unknown."""

    gemms: float | None  # FLOP/s
    copies: float | None  # bytes/s
    link: float | None  # bytes/s
    latency: float = LATENCY  # seconds


class Device(NamedTuple):
    """Where a run is planned."""

    name: str  # as PyTorch reports it, or as it was given
    kind: str  # "cuda" or "cpu"
    free_bytes: int
    rates: Rates
    is_whole: bool  # the free bytes are a whole card's, with nothing on it yet


def find_device(
    device: str | torch.device | None,
    free_bytes: int | None,
    rate: float | None,
    link: float | None = None,
) -> Device:
    """The device that is meant.

    Args:
        device: a PyTorch device, whose free memory is asked for; a name of ``CARDS``, whose whole
            memory counts as free; None: the GPU where there is one, else the CPU.
        free_bytes: instead of what the device has.
        rate: FLOP/s of its GEMMs instead of the known one.
        link: bytes/s between two of them instead of the known one.

    Raises:
        ValueError: when the device is neither here nor known, or a number is out of range.
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
    """What can still be allocated."""
    if device.type == "cpu":
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return chunking.free_bytes(device)
