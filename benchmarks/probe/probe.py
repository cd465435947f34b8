"""The sizes, the operands and the clock of the probe."""

import time
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from fused_sd.bench.measure import peak_bytes, quantile, synchronize
from fused_sd.bench.problem import Problem, Shape, make_problem

Say = Callable[[dict[str, Any]], None]
SHAPE, TINY = Shape("qwen3-8b", 4096, 151936), Shape("tiny", 32, 1000)


class Probe:
    """Measures with the sizes of one model.

    Args:
        device: where everything runs.
        tiny: whether the sizes are those of a dry run.
        write: what is done with a measurement.
    """

    def __init__(self, device: torch.device, tiny: bool, write: Say) -> None:
        self.device, self.tiny, self.write = device, tiny, write
        self.dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        self.shape = TINY if tiny else SHAPE
        self.num_tokens, self.runs = (64, 1) if tiny else (16384, 8)
        self._problem: Problem | None = None

    def say(self, **facts: Any) -> None:
        """Write a measurement, with four digits of each number."""
        self.write({k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in facts.items()})

    def rows(self, *counts: int) -> list[int]:
        """Return the numbers of rows to measure; in a dry run one small number."""
        return [32] if self.tiny else list(counts)

    def warm_up(self, run: Callable[[], object]) -> None:
        """Run for two seconds, so that a GPU's clocks settle."""
        end = time.perf_counter() + (0 if self.tiny else 2)
        while time.perf_counter() < end:
            run()
            synchronize(self.device)

    def milliseconds(self, run: Callable[[], object], runs: int | None = None) -> tuple[float, ...]:
        """Return the median time of a run, and the time that the host needs to enqueue one."""
        count = 1 if self.tiny else runs or self.runs
        for _ in range(2):
            run()
        synchronize(self.device)
        if self.device.type != "cuda":
            started = time.perf_counter()
            run()
            took = 1e3 * (time.perf_counter() - started)
            return took, took
        events = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
        events[0].record()
        started = time.perf_counter()
        for event in events[1:]:
            run()
            event.record()
        host = 1e3 * (time.perf_counter() - started) / count
        synchronize(self.device)
        return quantile([a.elapsed_time(b) for a, b in pairwise(events)], 0.5), host

    def normal(self, *shape: int, dtype: torch.dtype | None = None, scale: float = 1.0) -> Tensor:
        """Draw normal numbers, in the operands' dtype unless another is named."""
        return (scale * torch.randn(shape, device=self.device)).to(dtype or self.dtype)

    def problem(self) -> Problem:
        """Draw realistic operands once."""
        if self._problem is None:
            self._problem = make_problem(
                self.shape, self.num_tokens, dtype=self.dtype, device=self.device
            )
        return self._problem

    def loss(self, name: str, compute: Callable[[Problem], Tensor], part: str) -> None:
        """Measure forward and backward of a loss: time, the host's time, and the peak memory."""
        problem = self.problem()

        def run() -> None:
            compute(problem).backward()
            problem.hidden.grad = problem.weight.grad = None

        took, host = self.milliseconds(run, 5)
        peak = peak_bytes(run, self.device)
        self.say(part=part, name=name, ms=took, host_ms=host, peak_GiB=peak / 2**30)
