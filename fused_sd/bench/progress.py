"""What ``fused_sd bench`` says while it measures: what is done, and how long it will go on."""

import time
from collections.abc import Mapping, Sequence
from typing import NamedTuple, TextIO

import torch

from fused_sd.bench.floor import products
from fused_sd.bench.measure import Effort, warm_up
from fused_sd.bench.providers import Provider
from fused_sd.bench.providers.provider import why_absent

# For the estimate before anything is measured: a provider's time over that of its bare GEMMs, the
# runs that it makes beside the timed ones, and what each provider that compiles takes besides.
FACTOR, OTHER_RUNS, COMPILE_SECONDS = 3.0, 3, 10.0
SETUP_SECONDS, CHECK_SECONDS = 4.0, 1.0  # of a cell, and of each provider
SAMPLE_TOKENS, SAMPLE_VOCAB = 256, 8192  # of the GEMM whose rate the estimate takes


def runs_here(provider: Provider, device: torch.device) -> bool:
    """Whether a provider's package is here, and its device; nothing is imported to find out."""
    if provider.needs_gpu and device.type != "cuda":
        return False
    return provider.package is None or why_absent(provider.package) is None


def gemm_rate(hidden_size: int, dtype: torch.dtype, device: torch.device) -> float:
    """FLOP/s of a small GEMM with a head of this hidden size."""
    left = torch.randn(SAMPLE_TOKENS, hidden_size, dtype=dtype, device=device)
    right = torch.randn(SAMPLE_VOCAB, hidden_size, dtype=dtype, device=device)
    out = left.new_empty(SAMPLE_TOKENS, SAMPLE_VOCAB)

    def run() -> None:
        torch.mm(left, right.t(), out=out)

    warm_up(run, device, 0.0)
    seconds = warm_up(run, device, 0.1)
    return 2.0 * SAMPLE_TOKENS * hidden_size * SAMPLE_VOCAB / seconds


class Work(NamedTuple):
    """What decides how long a cell takes."""

    objective: str
    trainable: bool
    flop: float  # of one GEMM with the head
    effort: Effort


def expected_seconds(work: Work, providers: Sequence[Provider], rate: float) -> float:
    """Return about how long a cell takes with these providers, from the rate of GEMMs."""
    once = FACTOR * work.flop * products(work.objective, work.trainable).u / rate
    effort, total = work.effort, SETUP_SECONDS
    for provider in providers:
        if work.objective in provider.objectives:
            timed = min(effort.runs * once, max(effort.max_seconds, effort.least_runs * once))
            compiling = COMPILE_SECONDS if "compile" in provider.name else 0.0
            total += CHECK_SECONDS + OTHER_RUNS * once + timed + compiling
    return total


class Progress:
    """Lines about the cell that is measured now, with the time that is left for all of them.

    On a terminal each line takes the place of the one before.

    Args:
        out: where the lines go.
        expected: seconds of each cell, in their order.
    """

    def __init__(self, out: TextIO, expected: Mapping[str, float]) -> None:
        self.out, self.expected = out, dict(expected)
        self.is_terminal = out.isatty()
        self.title, self.done = "", 0
        self.started = time.monotonic()  # the cell
        self.pace = 1.0  # measured seconds over expected ones, of the cells that are done

    def begin(self, title: str) -> None:
        """Start the next cell."""
        self.title, self.started = title, time.monotonic()

    def say(self, what: str, left: float | None) -> None:
        """Write what is done now; ``left`` seconds of this cell are left, None: as expected."""
        if left is None:
            elapsed = time.monotonic() - self.started
            left = max(0.0, self.pace * self.expected[self.title] - elapsed)
        others = list(self.expected)[self.done + 1 :]
        left += self.pace * sum(self.expected[other] for other in others)
        place = f"[{self.done + 1}/{len(self.expected)}] {self.title}"
        line = f"{place}: {what}; about {duration(left)} left"
        line = f"\r\x1b[K{line}" if self.is_terminal else f"{line}\n"
        print(line, file=self.out, flush=True, end="")

    def end(self) -> None:
        """End the cell, and learn from the time that it took."""
        self.done += 1
        self.pace = (time.monotonic() - self.started) / self.expected[self.title]
        if self.is_terminal:
            print("\r\x1b[K", file=self.out, flush=True, end="")


def duration(seconds: float) -> str:
    """Format seconds, from two minutes on as minutes."""
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"
