"""A trainer's own ``train()``, fed with batches of ours and measured step by step.

What to run next is decided by a schedule, a generator that yields a batch and is sent what its step
took.  The training ends with the schedule.
"""

import ctypes
import gc
import time
from collections.abc import Callable, Generator
from typing import Any, NamedTuple

import torch
from transformers import TrainerCallback

from fused_sd.bench.measure import is_out_of_memory
from fused_sd.demo.memory import Peak

Batch = dict[str, Any]
NO_WORKSPACE = "CUBLAS_STATUS_ALLOC_FAILED"  # how cuBLAS says it


class Step(NamedTuple):
    """What one step took, from its batch to the cleared gradients.

    Attributes:
        seconds: wall clock.
        held_bytes: before the step: weights and the optimiser's state.
        peak_bytes: the most that was held at once, ``held_bytes`` included.
        out_of_memory: it did not end; the other numbers then mean nothing.
        kept_bytes: after running out of memory, what was not given back.
    """

    seconds: float
    held_bytes: int
    peak_bytes: int
    out_of_memory: bool
    kept_bytes: int = 0


Schedule = Generator[Batch, Step, None]


class StepLoop(TrainerCallback):
    """Runs a schedule inside ``trainer.train()``.

    Args:
        trainer: built and not yet trained.
        schedule: yields batches.
        device: "cpu" or "cuda".
        inspect: called once, with model, batch and loss, after the first backward.
    """

    def __init__(
        self,
        trainer: Any,
        schedule: Schedule,
        device: str,
        inspect: Callable[[Any, Batch, Any], None],
    ) -> None:
        self.trainer, self.schedule, self.device = trainer, schedule, device
        self.inspect: Callable[[Any, Batch, Any], None] | None = inspect
        self.failed = False

    def run(self) -> None:
        self.batch = next(self.schedule)
        self.training_step = self.trainer.training_step
        self.trainer.training_step = self._guarded_step
        self.trainer._prepare_inputs = lambda rows: self.batch
        self.trainer.add_callback(self)
        self.trainer.train()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.failed = False
        if self.device == "cpu":  # else what the last step freed would count as held
            _trim()
        self.peak = Peak(self.device).start()
        self.started = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.peak.stop()  # on a GPU it waits for the work that is queued
        seconds = time.perf_counter() - self.started
        kept = 0
        if self.failed:
            release(self.device)
            kept = self.peak.held_now() - self.peak.start_bytes
        step = Step(seconds, self.peak.start_bytes, self.peak.highest_bytes, self.failed, kept)
        try:
            self.batch = self.schedule.send(step)
        except StopIteration:
            control.should_training_stop = True

    def _guarded_step(self, model: Any, rows: Any, num_items: Any = None) -> torch.Tensor:
        """The trainer's step; one that runs out of memory leaves the optimiser nothing to do."""
        try:
            loss: torch.Tensor = self.training_step(model, rows, num_items)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error) and NO_WORKSPACE not in str(error):
                raise
            self.failed = True
        if self.failed:  # outside of the except, which keeps the step's frames and tensors alive
            model.zero_grad(set_to_none=True)
            return torch.zeros((), device=self.trainer.args.device)
        if self.inspect is not None:
            self.inspect(model, self.batch, loss)
            self.inspect = None
        return loss


def release(device: str) -> None:
    """Give back what the allocators hold in reserve, so that lengths do not blur each other."""
    gc.collect()
    if device == "cpu":
        _trim()
    else:
        torch.cuda.empty_cache()


def _trim() -> None:
    ctypes.CDLL(None).malloc_trim(0)
