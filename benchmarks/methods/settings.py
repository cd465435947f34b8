"""The methods' settings, from their papers or official code, and their learning rates.

Every method gets the same questions in the same order and equally many generations.  For the tiny
model each method's learning rate is the best of three on the validation questions, with one seed
that no result uses; ``python -m benchmarks.methods select --steps 80`` prints the table anew.
SmolLM2 uses one rate for all methods.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

SELECTION_SEED = 100
GROUP = 8  # generations for each question
LORA_RANK = 16  # for SmolLM2; the tiny model is trained whole


@dataclass(frozen=True)
class Method:
    """A trainer, the context of its teacher, and the settings beside its defaults.

    Attributes:
        label: The name in tables and plots.
        trainer: The class name in ``fused_sd.integrations.trl``.
        hint: The dataset's ``privileged_context``: "solution" or "answer".
        template: The name of the task's template for the teacher's context; None: no teacher.
        settings: Arguments of the configuration, by task; "" stands for every task.
    """

    label: str
    trainer: str
    hint: str = "answer"
    template: str | None = None
    settings: Mapping[str, Mapping[str, Any]] | None = None

    @property
    def config(self) -> str:
        """The class name of the trainer's configuration."""
        return self.trainer.replace("Trainer", "Config")


METHODS = {
    "rft": Method("RFT", "RFTTrainer"),
    "grpo": Method("GRPO", "GRPOTrainer"),
    # the paper skips the first tokens, but these responses have only ten
    "sdft": Method(
        "SDFT", "SDFTTrainer", "solution", "hinted", {"": {"num_loss_tokens_to_skip": 0}}
    ),
    "opsd": Method("OPSD", "OPSDTrainer", "solution", "hinted"),
    "opsd_unclipped": Method(
        "OPSD, no clip", "OPSDTrainer", "solution", "hinted", {"": {"entry_clip": None}}
    ),
    # the default top 100 exceeds the tiny vocabulary
    "sdpo": Method(
        "SDPO",
        "SDPOTrainer",
        template="sibling",
        settings={"tiny": {"distillation_mode": "full_logits"}},
    ),
    # runs are short: the teacher is copied every 10 steps, not every 20
    "rlsd": Method("RLSD", "RLSDTrainer", "answer", "hinted", {"": {"teacher_sync_steps": 10}}),
    "sd_zero": Method(
        "SD-Zero",
        "SDZeroTrainer",
        template="verdict",
        settings={"tiny": {"distillation_topk": 16}},
    ),
}


@dataclass(frozen=True)
class Scale:
    """The size of a training.

    Attributes:
        steps: Optimizer steps, each with new generations.
        prompts: Questions of a step.
        look_every: Steps between two evaluations.
        num_questions: Questions of an evaluation; None: all.
    """

    steps: int
    prompts: int
    look_every: int
    num_questions: int | None = None

    @property
    def generations(self) -> int:
        """Generations of one step."""
        return self.prompts * GROUP


@dataclass(frozen=True)
class Discovery:
    """The size of the discovery experiment.

    Attributes:
        num_questions: Hard questions for each seed.
        hard_samples: A question is hard if this many samples of the base model are wrong.
        max_attempts: Attempts at each question.
        topk: Entries of the student's support; fewer than the vocabulary.
    """

    num_questions: int = 10
    hard_samples: int = 128
    max_attempts: int = 512
    topk: int = 16


SCALES = {
    "tiny": Scale(steps=120, prompts=8, look_every=10),
    "smollm2": Scale(steps=16, prompts=2, look_every=8),
}
QUICK_DISCOVERY = Discovery(num_questions=1, hard_samples=1, max_attempts=32)
QUICK = Scale(steps=2, prompts=2, look_every=1, num_questions=20)

GRID = {"tiny": (1e-4, 2e-4, 4e-4), "smollm2": (2e-4,)}
# Learning rate: accuracy on the validation questions after 80 steps (tiny).  The grid leaves out
# 1e-3: most methods collapsed with it in a trial on another base model.
RATES: dict[str, dict[str, dict[float, float]]] = {
    "tiny": {
        "rft": {1e-4: 0.773, 2e-4: 0.853, 4e-4: 0.870},
        "grpo": {1e-4: 0.760, 2e-4: 0.850, 4e-4: 0.817},
        "sdft": {1e-4: 0.787, 2e-4: 0.890, 4e-4: 0.897},
        "opsd": {1e-4: 0.403, 2e-4: 0.307, 4e-4: 0.260},
        "opsd_unclipped": {1e-4: 0.787, 2e-4: 0.890, 4e-4: 0.920},
        "sdpo": {1e-4: 0.753, 2e-4: 0.777, 4e-4: 0.730},
        "rlsd": {1e-4: 0.753, 2e-4: 0.857, 4e-4: 0.897},
        "sd_zero": {1e-4: 0.810, 2e-4: 0.887, 4e-4: 0.887},
    },
    "smollm2": {name: dict.fromkeys(GRID["smollm2"], 0.0) for name in METHODS},
}
DISCOVERY_RATE = 3e-4  # the best of 1e-4, 3e-4 and 1e-3 on hard validation questions

# SmolLM2 corrects none of its wrong answers after a verdict: SD-Zero has nothing to distil
LEFT_OUT = {"tiny": (), "smollm2": ("sd_zero",)}


def methods_of(task: str) -> list[str]:
    """Return the methods that run by default."""
    return [name for name in METHODS if name not in LEFT_OUT[task]]


def learning_rate(task: str, method: str) -> float:
    """Return the best of the measured rates; the smallest of equally good ones."""
    measured = RATES[task][method]
    return min(measured, key=lambda rate: (-measured[rate], rate))


def method_settings(task: str, method: str) -> dict[str, Any]:
    """Return the arguments beside the configuration's defaults and the templates."""
    by_task = METHODS[method].settings or {}
    return {**by_task.get("", {}), **by_task.get(task, {})}
