"""Measure the memory and time of one SDPO step, for TRL's own trainer and for this library's.

Each trainer runs in a process of its own, so that nothing held before blurs its peak.  On a CPU the
measure is resident memory, which is what runs out; on a GPU it is what PyTorch's allocator has
handed out.  The batch is longer than the demo's, as in real post-training.  Its tokens are random,
because memory does not depend on them.

The trainers take steps in turns, and the fastest step of each counts.  On a CPU its time is the CPU
seconds of all threads: where other programs want the same cores, the seconds on the clock of two
equal steps differ by a factor of two.
"""

import tempfile
import threading
import time
import warnings
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from fused_sd.demo.train import Settings, TrainerKind, build_trainer

KINDS: tuple[TrainerKind, ...] = ("stock", "fused")
NUM_STEPS = 3  # of each trainer
NUM_COMPLETIONS, COMPLETION_LENGTH = 8, 128
STUDENT_PROMPT, TEACHER_PROMPT = 8, 40


@dataclass(frozen=True)
class StepMemory:
    """Hold the measurements of one step, or the best of several."""

    trainer: TrainerKind
    peak_mib: float  # above what was held before the step
    seconds: float  # on a CPU the CPU seconds of all threads
    loss: float  # the same for both trainers, up to rounding
    num_tokens: int
    logits_mib: float  # one float32 matrix of all the logits, to compare with


def measure_in_turns(directory: Path, device: str) -> list[StepMemory]:
    """Measure steps of all trainers in turns, each trainer in a fresh process.

    Errors of those processes are raised here.
    """
    with ExitStack() as stack:
        # without "spawn" the processes would start with this one's memory
        spawn = get_context("spawn")
        pools = [stack.enter_context(ProcessPoolExecutor(1, spawn)) for _ in KINDS]
        for kind, pool in zip(KINDS, pools):
            pool.submit(prepare, kind, directory, device).result()
        turns = [[pool.submit(measure).result() for pool in pools] for _ in range(NUM_STEPS)]
    return [best(steps) for steps in zip(*turns)]


def time_name(device: str) -> str:
    """Return the unit of ``StepMemory.seconds``."""
    return "CPU seconds" if device == "cpu" else "s"


def best(steps: Sequence[StepMemory]) -> StepMemory:
    """Return the fastest step with the highest peak, as later steps reuse the first's memory."""
    fastest = min(steps, key=lambda step: step.seconds)
    return replace(fastest, peak_mib=max(step.peak_mib for step in steps))


_prepared: list[tuple[Any, TrainerKind, str]] = []  # this process's trainer and device


def prepare(kind: TrainerKind, directory: Path, device: str) -> None:
    """Make this process's trainer, and take a tiny step: what is allocated once is not counted."""
    warnings.simplefilter("ignore")
    from fused_sd.demo import task
    from fused_sd.demo.model import load

    model, tokenizer = load(directory, device)
    settings = Settings(trainer=kind, device=device)
    with tempfile.TemporaryDirectory() as scratch:
        trainer = build_trainer(
            model,
            tokenizer,
            task.split_words(settings.num_held_out),
            settings,
            Path(scratch),
            activation_checkpointing=True,  # TRL's default
        )
    # TRL's training loop sets this, and compute_loss divides by it
    trainer.current_gradient_accumulation_steps = 1
    trainer.log_fused_metrics = False  # TRL's trainer computes no KLs and entropies to log either
    trainer.model.train()
    _one_step(trainer, random_batch(model.config.vocab_size, device, completion_length=4))
    _prepared.append((trainer, kind, device))


def measure() -> StepMemory:
    """Measure one ``compute_loss`` and ``backward`` of this process's trainer."""
    ((trainer, kind, device),) = _prepared
    vocab_size = trainer.model.config.vocab_size
    batch = random_batch(vocab_size, device, COMPLETION_LENGTH)
    clock = time.process_time if device == "cpu" else time.perf_counter
    with Peak(device) as peak:
        started = clock()
        loss = _one_step(trainer, batch)
        seconds = clock() - started
    num_tokens = batch["completion_ids"].numel()
    logits_mib = num_tokens * vocab_size * 4 / 2**20
    return StepMemory(kind, peak.mib, seconds, loss, num_tokens, logits_mib)


def random_batch(vocab_size: int, device: str, completion_length: int) -> dict[str, Any]:
    """Return a batch of random tokens with the fields that TRL's ``compute_loss`` reads."""
    import torch

    torch.manual_seed(0)

    def ids(length: int) -> Any:
        return torch.randint(vocab_size, (NUM_COMPLETIONS, length), device=device)

    completion, prompt, context = ids(completion_length), ids(STUDENT_PROMPT), ids(TEACHER_PROMPT)
    teacher = torch.cat([context, completion], dim=1)
    return {
        "prompt_ids": prompt,
        "prompt_mask": torch.ones_like(prompt),
        "completion_ids": completion,
        "completion_mask": torch.ones_like(completion),
        "teacher_input_ids": teacher,
        "teacher_attention_mask": torch.ones_like(teacher),
    }


def _one_step(trainer: Any, batch: dict[str, Any]) -> float:
    loss = trainer.compute_loss(trainer.model, batch)
    loss.backward()
    return loss.item()


class Peak:
    """Record the most memory held inside a ``with``, or between ``start`` and ``stop``.

    Attributes:
        start_bytes: bytes held at the start.
        highest_bytes: the most bytes held at once.
    """

    def __init__(self, device: str) -> None:
        self.device = device
        self.start_bytes = self.highest_bytes = 0

    @property
    def mib(self) -> float:
        """The peak above what was held at the start."""
        return (self.highest_bytes - self.start_bytes) / 2**20

    def held_now(self) -> int:
        """Return the bytes held now: resident memory on a CPU, PyTorch's allocations on a GPU."""
        if self.device == "cpu":
            import psutil

            return psutil.Process().memory_info().rss
        import torch

        return torch.cuda.memory_allocated()

    def start(self) -> "Peak":
        if self.device != "cpu":
            import torch

            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        self.start_bytes = self.highest_bytes = self.held_now()
        if self.device == "cpu":
            self._done = threading.Event()
            # sampled, because the system's own record of the peak cannot be reset
            self._thread = threading.Thread(target=self._watch, daemon=True)
            self._thread.start()
        return self

    def stop(self) -> None:
        if self.device == "cpu":
            self._done.set()
            self._thread.join()
            return
        import torch

        torch.cuda.synchronize()
        self.highest_bytes = torch.cuda.max_memory_allocated()

    __enter__ = start

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _watch(self) -> None:
        while not self._done.wait(0.005):
            self.highest_bytes = max(self.highest_bytes, self.held_now())
