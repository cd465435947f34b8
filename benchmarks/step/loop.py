"""A trainer's own ``train()`` on our batches, measured step by step.

A schedule decides the batches: a generator that yields a batch and receives the ``Step`` that it
took.  Training ends when the schedule ends.
"""

import ctypes
import gc
import time
from collections.abc import Callable, Generator
from typing import Any, NamedTuple

import torch
from transformers import TrainerCallback

from fused_sd.demo.memory import Peak
from fused_sd.engine.out_of_memory import is_out_of_memory

Batch = dict[str, Any]
NO_WORKSPACE = "CUBLAS_STATUS_ALLOC_FAILED"  # cuBLAS's message when memory runs out


class Step(NamedTuple):
    """Time and memory of one step, from its batch to the cleared gradients.

    Attributes:
        seconds: Wall-clock time.
        held_bytes: Bytes held before the step: weights and the optimizer's state.
        peak_bytes: The most bytes held at once, ``held_bytes`` included.
        out_of_memory: Whether the step ran out of memory; the other numbers then mean nothing.
        kept_bytes: Bytes that were still held after a step ran out of memory.
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
        trainer: A trainer that has not been trained.
        schedule: Yields batches and receives steps.
        device: "cpu" or "cuda".
        inspect: Called once, after the first backward, with model, batch and loss.
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
        if self.device == "cpu":  # or memory that the last step freed would count as held
            _trim()
        self.peak = Peak(self.device).start()
        self.started = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.peak.stop()  # on a GPU this waits for the queued work
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
        """Run the trainer's step; out of memory, leave the optimizer no gradients to apply."""
        try:
            loss: torch.Tensor = self.training_step(model, rows, num_items)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error) and NO_WORKSPACE not in str(error):
                raise
            self.failed = True
        if self.failed:  # not in the except block: it keeps the step's tensors alive
            model.zero_grad(set_to_none=True)
            return torch.zeros((), device=self.trainer.args.device)
        if self.inspect is not None:
            self.inspect(model, self.batch, loss)
            self.inspect = None
        return loss


def release(device: str) -> None:
    """Return the allocators' cached memory, so that one length does not affect the next."""
    gc.collect()
    if device == "cpu":
        _trim()
    else:
        torch.cuda.empty_cache()


def _trim() -> None:
    ctypes.CDLL(None).malloc_trim(0)
