"""Test-time self-distillation: SDPO on one question until a response passes.

A reward of 0 for every response teaches nothing.  Feedback about a failure does: the teacher reads
it, and the student learns from the teacher before it tries again.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from accelerate.utils import gather_object
from datasets import Dataset
from torch import Tensor
from transformers import TrainerCallback

from fused_sd.checks import check_positive_int, fail
from fused_sd.integrations.shared.as_it_was import left_as_it_was
from fused_sd.integrations.trl.sdpo import SDPOConfig, SDPOTrainer

ATTEMPTS_FILE = "attempts.json"  # in a checkpoint


@dataclass
class DiscoveryConfig(SDPOConfig):
    """Settings of test-time SDPO; defaults are the paper's (arXiv 2601.20802).

    There is no official code of it; the learning rate is that of SDPO's runs with feedback.
    ``max_steps`` is computed from ``max_attempts``.

    Examples:
        >>> from fused_sd.integrations.trl import DiscoveryConfig
        >>> args = DiscoveryConfig("out", max_attempts=64)
        >>> args.distillation_topk, args.teacher_update_rate
        (20, 0.01)
    """

    max_attempts: int = field(
        default=2750, metadata={"help": "Responses to sample before giving up."}
    )
    stop_at_success: bool = field(default=True, metadata={"help": "Stop at the first success."})
    num_generations: int = field(default=16, metadata={"help": "Attempts in a step."})
    per_device_train_batch_size: int = field(
        default=16, metadata={"help": "Attempts in a forward."}
    )
    learning_rate: float = field(default=1e-6, metadata={"help": "Learning rate."})
    warmup_steps: float = field(default=0, metadata={"help": "Steps to the learning rate."})
    distillation_alpha: float = field(default=1.0, metadata={"help": "1: KL(s||t)."})
    distillation_topk: int | None = field(
        default=20, metadata={"help": "Size of the student's support."}
    )
    teacher_update_rate: float = field(
        default=0.01, metadata={"help": "Rate of the moving average."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        assert self.generation_batch_size
        assert self.steps_per_generation
        check_positive_int("max_attempts", self.max_attempts)
        num_batches = -(-self.max_attempts // self.generation_batch_size)
        micro_steps = num_batches * self.steps_per_generation * self.num_iterations
        self.max_steps = -(-micro_steps // self.gradient_accumulation_steps)


class DiscoveryTrainer(SDPOTrainer):
    """SDPO on one row of data; ``train()`` ends with the first success or the last attempt.

    Attributes:
        rewards: the rewards of all attempts, in the order of sampling; NaN without a verdict.
        first_success: the number of the first attempt that passed, counted from 1, or None.
        solution: the text of that attempt, or None.

    Examples:
        >>> from fused_sd.integrations.examples.arithmetic import feedback, questions, reward
        >>> from fused_sd.integrations.trl import DiscoveryConfig, DiscoveryTrainer
        >>> model = "Qwen/Qwen2.5-0.5B-Instruct"
        >>> args, question = DiscoveryConfig("out", max_attempts=64), questions(1)
        >>> trainer = DiscoveryTrainer(model, reward, args, question, feedback_func=feedback)
        >>> trainer.train()  # doctest: +SKIP
        >>> trainer.solution is None  # until an attempt passes
        True
    """

    config_cls = DiscoveryConfig
    _name = "Test-time SDPO"

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.rewards: list[float] = []
        self.first_success: int | None = None
        self.solution: str | None = None
        with left_as_it_was(*args, **kwargs):
            super().__init__(*args, **kwargs)
            size = len(self.train_dataset) if hasattr(self.train_dataset, "__len__") else None
            if size != 1:
                got = "a stream" if size is None else f"{size} rows"
                fail("train_dataset", "be one question", got, "make a trainer for each")
            # TRL fills a generation batch with different rows: one that holds several groups needs
            # as many copies of the question.
            copies = self.args.generation_batch_size // self.num_generations
            self.train_dataset = Dataset.from_list(list(self.train_dataset) * copies)
            if self.args.stop_at_success:
                self.add_callback(_StopAtSuccess(self))

    def _calculate_rewards(self, *args: Any, **kwargs: Any) -> Tensor:
        """Record the attempts; rewards come back gathered, and texts are gathered to match.

        What an evaluation samples is no attempt.
        """
        per_function = super()._calculate_rewards(*args, **kwargs)
        texts = gather_object(list(self.scored.texts))
        for text, reward in zip(texts, self.scored.rewards.tolist()) if self.model.training else ():
            self.rewards.append(reward)
            if reward >= self.args.success_reward_threshold and self.first_success is None:
                self.first_success, self.solution = len(self.rewards), text
        return per_function

    def _save_beside(self, folder: str) -> None:
        """Save the attempts too: without them a resumed run would count from 1 again."""
        super()._save_beside(folder)
        if self.args.should_save:
            attempts = self.rewards, self.first_success, self.solution
            Path(folder, ATTEMPTS_FILE).write_text(json.dumps(attempts), encoding="utf-8")

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Load the attempts too, where Trainer resumes."""
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None:
            return
        path = Path(checkpoint, ATTEMPTS_FILE)
        if not path.exists():
            rule, remedy = f"hold {ATTEMPTS_FILE}", "resume from a checkpoint of DiscoveryTrainer"
            fail("resume_from_checkpoint", rule, f"{checkpoint} without it", remedy)
        self.rewards, self.first_success, self.solution = _read_attempts(path)


def _read_attempts(path: Path) -> tuple[list[float], int | None, str | None]:
    """Return what ``DiscoveryTrainer`` has written beside a checkpoint."""
    try:
        rewards, first, solution = json.loads(path.read_text(encoding="utf-8"))
        rewards = [float(reward) for reward in rewards]
        if not isinstance(first, int | None) or not isinstance(solution, str | None):
            raise TypeError("the first success is no number, or the solution no text")
    except (TypeError, ValueError, RecursionError) as error:
        rule, remedy = "hold the attempts of a run", "resume from a whole checkpoint"
        fail(ATTEMPTS_FILE, rule, f"{path.parent} ({error!r})", remedy)
    return rewards, first, solution


class _StopAtSuccess(TrainerCallback):
    """Stops training once an attempt has passed."""

    def __init__(self, trainer: DiscoveryTrainer) -> None:
        self.trainer = trainer

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop |= self.trainer.first_success is not None


def discovery_probability(first_successes: Sequence[int | None], num_attempts: int) -> float:
    """Return the paper's discovery@k: the share of runs that passed within k attempts.

    Args:
        first_successes: ``DiscoveryTrainer.first_success`` of each run.
        num_attempts: k.

    Raises:
        ValueError: there is no run.

    Examples:
        >>> from fused_sd.integrations.trl import discovery_probability
        >>> discovery_probability([3, None, 17, 2], num_attempts=16)  # of four runs, two by then
        0.5
    """
    if not first_successes:
        fail("first_successes", "hold at least one run", "none", "run DiscoveryTrainer first")
    found = [first is not None and first <= num_attempts for first in first_successes]
    return sum(found) / len(found)
