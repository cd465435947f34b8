"""Each method's settings: what its paper or code says, and a learning rate of equal effort.

Every method takes the same questions in the same order and as many generations of each.  The
tiny model's learning rate is the best of three on the validation questions, for one seed that no
result uses; ``python -m benchmarks.methods select --steps 80`` measures the table again.  SmolLM2's
is the same for all.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

SELECTION_SEED = 100
GROUP = 8  # generations of a question, for every method


@dataclass(frozen=True)
class Method:
    """A trainer, what its teacher reads, and what differs from its defaults.

    Attributes:
        label: name in tables and plots.
        trainer: class name in ``fused_sd.integrations.trl``.
        hint: the dataset's ``privileged_context``.
        template: of the task's templates, the one for this method's teacher; None: no teacher.
        settings: of the configuration, by task; the rest are its defaults.
    """

    label: str
    trainer: str
    hint: str = "answer"
    template: str | None = None
    settings: Mapping[str, Mapping[str, Any]] | None = None

    @property
    def config(self) -> str:
        """Class name of its configuration."""
        return self.trainer.replace("Trainer", "Config")


METHODS = {
    "rft": Method("RFT", "RFTTrainer"),
    "grpo": Method("GRPO", "GRPOTrainer"),
    # a response of ten tokens has none to skip
    "sdft": Method(
        "SDFT", "SDFTTrainer", "solution", "hinted", {"": {"num_loss_tokens_to_skip": 0}}
    ),
    "opsd": Method("OPSD", "OPSDTrainer", "solution", "hinted"),
    "opsd_unclipped": Method(
        "OPSD, no clip", "OPSDTrainer", "solution", "hinted", {"": {"entry_clip": None}}
    ),
    # 100 entries are more than the tiny vocabulary holds
    "sdpo": Method(
        "SDPO",
        "SDPOTrainer",
        template="sibling",
        settings={"tiny": {"distillation_mode": "full_logits"}},
    ),
    # the paper's interval of the teacher's copies: runs are short
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
    """How much is run.

    Attributes:
        steps: optimiser steps, each with its own generations.
        prompts: questions of a step.
        look_every: steps between two looks at the held-out questions.
        num_questions: held-out questions of a look; None: all.
    """

    steps: int
    prompts: int
    look_every: int
    num_questions: int | None = None

    @property
    def generations(self) -> int:
        """Of one step."""
        return self.prompts * GROUP


@dataclass(frozen=True)
class Discovery:
    """How hard questions are found and worked on at test time.

    Attributes:
        num_questions: of each seed.
        hard_samples: samples of the base model, all wrong, that make a question hard.
        max_attempts: of each question.
        topk: entries of the student's support; fewer than the vocabulary.
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
# learning rate: accuracy on the validation questions after 80 steps (tiny); 1e-3 undid most methods
# in a trial on another base model
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
DISCOVERY_RATE = 3e-4  # of 1e-4, 3e-4 and 1e-3, by hard questions of the validation part


# SmolLM2 corrects none of its wrong answers when it is told so: SD-Zero has nothing to start from
LEFT_OUT = {"tiny": (), "smollm2": ("sd_zero",)}


def methods_of(task: str) -> list[str]:
    """Methods that are run unless others are asked for."""
    return [name for name in METHODS if name not in LEFT_OUT[task]]


def learning_rate(task: str, method: str) -> float:
    """The best of the measured rates; of equals the smallest."""
    measured = RATES[task][method]
    return min(measured, key=lambda rate: (-measured[rate], rate))


def method_settings(task: str, method: str) -> dict[str, Any]:
    """What differs from the configuration's defaults, beside the templates."""
    by_task = METHODS[method].settings or {}
    return {**by_task.get("", {}), **by_task.get(task, {})}
