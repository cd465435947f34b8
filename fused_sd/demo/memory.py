"""Memory of one SDPO step, TRL's own trainer beside ours, each in a process of its own.

A process is measured because that is what runs out: its peak resident memory during one
``compute_loss`` and ``backward``, above what it held just before.  On a GPU it is the peak of
PyTorch's allocator.  The batch is longer than the demo's, as in real post-training; which tokens it
holds does not matter, so they are random.

    python -m fused_sd.demo.memory stock /path/to/model cpu    prints one line of JSON
"""

import json
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast, get_args

from fused_sd.demo.model import quiet_and_offline
from fused_sd.demo.train import Settings, TrainerKind, build_trainer

NUM_COMPLETIONS, COMPLETION_LENGTH = 8, 128
STUDENT_PROMPT, TEACHER_PROMPT = 8, 40


@dataclass(frozen=True)
class StepMemory:
    """One measured step."""

    trainer: TrainerKind
    peak_mib: float  # above what was held before the step
    seconds: float
    loss: float  # the two trainers must agree on it
    num_tokens: int
    logits_mib: float  # one float32 matrix of all the logits, to compare with


def measure_in_subprocess(kind: TrainerKind, directory: Path, device: str) -> StepMemory:
    """Run this module in a fresh process, so that nothing held before blurs the peak.

    Raises:
        RuntimeError: when the process fails; its last lines of output are in the message.
    """
    command = [sys.executable, "-m", "fused_sd.demo.memory", kind, str(directory), device]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(
            f"the memory measurement of the {kind} trainer must exit with 0, got "
            f"{done.returncode}; run {' '.join(command)} to see why: {done.stderr[-600:]}"
        )
    return StepMemory(**json.loads(done.stdout.splitlines()[-1]))


def measure(kind: TrainerKind, directory: Path, device: str) -> StepMemory:
    """One step in this process."""
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
    # the training loop sets this; a single step has nothing to accumulate
    trainer.current_gradient_accumulation_steps = 1
    trainer.log_fused_metrics = False  # like with like: TRL forms no KLs and entropies to log
    trainer.model.train()
    # a tiny step first, so that what is allocated once and for all is not counted
    _one_step(trainer, random_batch(model.config.vocab_size, device, completion_length=4))
    batch = random_batch(model.config.vocab_size, device, COMPLETION_LENGTH)

    with Peak(device) as peak:
        started = time.perf_counter()
        loss = _one_step(trainer, batch)
        seconds = time.perf_counter() - started
    num_tokens = batch["completion_ids"].numel()
    return StepMemory(
        trainer=kind,
        peak_mib=peak.mib,
        seconds=seconds,
        loss=loss,
        num_tokens=num_tokens,
        logits_mib=num_tokens * model.config.vocab_size * 4 / 2**20,
    )


def random_batch(vocab_size: int, device: str, completion_length: int) -> dict[str, Any]:
    """What TRL's rollout would hand to ``compute_loss``."""
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
    """The highest memory held between ``start`` and ``stop``, or inside a ``with``.

    On a GPU it is what PyTorch's allocator has handed out, on the CPU the process's resident
    memory.

    Attributes:
        start_bytes: held at the start.
        highest_bytes: the most that was held at once.
    """

    def __init__(self, device: str) -> None:
        self.device = device
        self.start_bytes = self.highest_bytes = 0

    @property
    def mib(self) -> float:
        """Above what was held at the start."""
        return (self.highest_bytes - self.start_bytes) / 2**20

    def held_now(self) -> int:
        if self.device == "cpu":
            return resident_bytes()
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
            # sampled, since the system's own record cannot be reset to forget the loading
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


def resident_bytes() -> int:
    """Resident memory of this process, read from the kernel."""
    import psutil

    return psutil.Process().memory_info().rss


if __name__ == "__main__":
    quiet_and_offline()
    if len(sys.argv) != 4 or sys.argv[1] not in get_args(TrainerKind):
        raise SystemExit(
            f"the arguments must be a trainer of {get_args(TrainerKind)}, a model's directory and "
            f"a device, got {sys.argv[1:]}; python -m fused_sd.demo calls this for you"
        )
    print(
        json.dumps(asdict(measure(cast(TrainerKind, sys.argv[1]), Path(sys.argv[2]), sys.argv[3])))
    )
