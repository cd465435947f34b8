"""The device that a plan is for: its free memory, and the rates that times are predicted from."""

import os
from typing import NamedTuple

import torch

from fused_sd import checks
from fused_sd.engine import layout as chunking
from fused_sd.measuring.environment import default_device, device_name

# Shares of a data sheet's numbers that are assumed where nobody's measurement is known: the H200
# reaches 0.70 of its sheet's FLOP/s at a head's shapes, and others copied on an H100 at 0.9 of its
# sheet's bandwidth.
ASSUMED_PEAK, ASSUMED_BANDWIDTH = 0.7, 0.9


class Card(NamedTuple):
    """A GPU by its data sheet, and what others measured on it; None: unknown."""

    memory: float  # bytes, nominal
    peak: float  # FLOP/s, dense bf16 with fp32 sums
    peak_bandwidth: float  # bytes/s, reads and writes both counted
    measured_rate: float | None = None  # FLOP/s of cuBLAS in 16 bits, at the shapes of a head
    link: float | None = None  # bytes/s that NCCL sends from one GPU to the next

    @property
    def rate(self) -> float:
        """FLOP/s of GEMMs, measured or assumed."""
        return self.measured_rate or ASSUMED_PEAK * self.peak

    @property
    def bandwidth(self) -> float:
        """Bytes/s of a copy, assumed."""
        return ASSUMED_BANDWIDTH * self.peak_bandwidth

    @property
    def source(self) -> str:
        """Where the rate of the GEMMs comes from, in words."""
        if self.measured_rate is not None:
            return "as others measured"
        return f"assumed: {ASSUMED_PEAK:.0%} of the data sheet's {self.peak / 1e12:.4g}"


# Memory, dense bf16 FLOP/s and bandwidth are the data sheets'; where one prints FLOP/s with
# sparsity, half of them.  Nothing was measured by us.  Link: NVLink 4 without sums in the switches,
# according to an author of NCCL (nccl-tests, issue 212).
CARDS: dict[str, Card] = {
    # NVIDIA H200 data sheet, SXM.  GEMMs: Liger's pull request 1356, (4096, 4096) x (4096, 128256)
    "H200": Card(141e9, 989e12, 4.8e12, measured_rate=690e12, link=370e9),
    "H100": Card(80e9, 989e12, 3.35e12, link=370e9),  # NVIDIA H100 data sheet, SXM
    "B200": Card(180e9, 2250e12, 8.0e12),  # NVIDIA DGX B200 data sheet, an eighth of the system
    "A100": Card(80e9, 312e12, 2.039e12),  # NVIDIA A100 data sheet, 80 GB SXM
    "L40S": Card(48e9, 362e12, 0.864e12),  # NVIDIA L40S data sheet
    "RTX 4090": Card(24e9, 165e12, 1.008e12),  # NVIDIA Ada architecture white paper
    "RTX 5090": Card(32e9, 209.5e12, 1.792e12),  # NVIDIA RTX Blackwell architecture white paper
    "MI300X": Card(192e9, 1307e12, 5.3e12),  # AMD Instinct MI300X data sheet
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
    source: str = ""  # where the GEMMs' rate comes from, in words


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
    if device is not None and not isinstance(device, str | torch.device):
        rule, remedy = "be a name or a torch.device", f"name one of {', '.join(CARDS)}, or 'cuda'"
        checks.fail("device", rule, repr(device), remedy)
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
    source = "given" if rate is not None else card.source if card is not None else ""
    if card is None:
        return Rates(rate, None, link, source=source)
    return Rates(rate or card.rate, card.bandwidth, link or card.link, source=source)


def _free_bytes(device: torch.device) -> int:
    """Bytes that can still be allocated."""
    if device.type == "cpu":
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return chunking.free_bytes(device)
