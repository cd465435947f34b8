"""The methods of the experiments, with the settings beside their trainers' defaults.

Every default is the paper's or its official code's.  An arm changes one only where its comment says
why, and gets the same questions, the same number of generations and the same grid of learning rates
as its rivals.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

GROUP = 8  # generations for each question


@dataclass(frozen=True)
class PhaseOne:
    """SD-Zero's first phase: how traces are collected, and what is trained on them.

    Defaults are the paper's.  Of the 60 thousand samples that its rivals get, phase 1 takes 40: for
    each question a response and three revisions of it, whether it was right or not.

    Attributes:
        objective: That of ``SRTConfig``, or "sequential": the official code's two stages.
        rate: The learning rate of phase 1; None: the arm's, which is phase 2's where there is one.
        share: The share of the arm's generations that the collection gets.
        num_initial: Responses to a question.
        num_revisions: Revisions of each response.
        revise_correct: Whether right responses are revised, too.
    """

    objective: str = "joint"
    rate: float | None = None
    share: float = 2 / 3
    num_initial: int = 1
    num_revisions: int = 3
    revise_correct: bool = True

    @property
    def generations_per_question(self) -> int:
        """The most generations that one question takes."""
        return self.num_initial * (1 + self.num_revisions)


@dataclass(frozen=True)
class Arm:
    """A method: its trainer, its teacher's context, and the settings beside its defaults.

    Attributes:
        name: The name in the results.
        label: The name in tables and plots.
        trainer: The class name in ``fused_sd.integrations.trl``; None: the model is not trained.
        hint: The dataset's ``privileged_context``: "solution" or "answer"; None: it has none.  SDPO
            would read it as feedback.
        template: The name of the task's template for the teacher's context; None: no teacher.
        settings: Arguments of the configuration.
        hears: Whether the trainer is given what the environment says.
        phase_one: SD-Zero's first phase; None: there is none.
    """

    name: str
    label: str
    trainer: str | None
    hint: str | None = None
    template: str | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    hears: bool = False
    phase_one: PhaseOne | None = None

    @property
    def config(self) -> str:
        """The class name of the trainer's configuration."""
        assert self.trainer is not None
        return self.trainer.replace("Trainer", "Config")


RFT = Arm("rft", "RFT", "RFTTrainer")
GRPO = Arm("grpo", "GRPO", "GRPOTrainer")
# the paper skips the first tokens, but these responses have only ten
SDFT = Arm("sdft", "SDFT", "SDFTTrainer", "solution", "hinted", {"num_loss_tokens_to_skip": 0})
OPSD = Arm("opsd", "OPSD", "OPSDTrainer", "solution", "hinted")
OPSD_UNCLIPPED = Arm(
    "opsd_unclipped", "OPSD, no clip", "OPSDTrainer", "solution", "hinted", {"entry_clip": None}
)
SDPO = Arm("sdpo", "SDPO", "SDPOTrainer", template="sibling")
# the default top 100 exceeds a vocabulary of characters
SDPO_TINY = Arm(
    "sdpo", "SDPO", "SDPOTrainer", template="sibling", settings={"distillation_mode": "full_logits"}
)
# the teacher is copied as often as in the paper, and the weights stay on, as in the official
# configuration file: the official script's 60 steps of decay would leave GRPO for half of a run
RLSD = Arm(
    "rlsd",
    "RLSD",
    "RLSDTrainer",
    "answer",
    "hinted",
    {"teacher_sync_steps": 10, "evidence_decay_steps": 0},
)
SD_ZERO = Arm("sd_zero", "SD-Zero, phase 2 alone", "SDZeroTrainer", template="verdict")
# the default top 64 exceeds a vocabulary of characters
SD_ZERO_TINY = Arm(
    "sd_zero",
    "SD-Zero, phase 2 alone",
    "SDZeroTrainer",
    template="verdict",
    settings={"distillation_topk": 16},
)
# phase 1 alone gets all generations
SRT = Arm(
    "srt", "SD-Zero, phase 1 alone", "SRTTrainer", template="verdict", phase_one=PhaseOne(share=1.0)
)
# Each phase has its own rate: phase 1 the best of the grid for phase 1 alone, phase 2 the arm's.
# With one rate for both, the grid chose one at which phase 1 only unlearned.
RATE_ONE = 8e-4
SD_ZERO_JOINT = replace(
    SD_ZERO_TINY,
    name="sd_zero_joint",
    label="SD-Zero",
    phase_one=PhaseOne("joint", rate=RATE_ONE),
)
# phase 1's traces never show a response's end before the verdict; the official phase 2 does
SD_ZERO_BARE = replace(
    SD_ZERO_JOINT,
    name="sd_zero_bare",
    label="SD-Zero, attempts without end",
    settings={**SD_ZERO_TINY.settings, "keep_response_end": False},
)
# the official script's phase 1: three responses and three revisions of each wrong one
SD_ZERO_SEQUENTIAL = replace(
    SD_ZERO_TINY,
    name="sd_zero_sequential",
    label="SD-Zero, stages of the official code",
    phase_one=PhaseOne(
        "sequential", rate=RATE_ONE, num_initial=3, num_revisions=3, revise_correct=False
    ),
)
# phase 2 renews its teacher after half of its steps
SD_ZERO_SYNCED = replace(
    SD_ZERO_BARE,
    name="sd_zero_synced",
    label="SD-Zero, teacher renewed",
    settings={**SD_ZERO_BARE.settings, "teacher_model_kind": "synced"},
)

# the ways to search for the answer to one hard question
BEST_OF_K = Arm("best_of_k", "best of k", None)
MULTI_TURN = Arm("multi_turn", "multi-turn", None, template="own attempt")
# a bare verdict says nothing without the attempt that it is about; the first success ends a search
TEST_TIME = Arm(
    "test_time",
    "self-distillation",
    "DiscoveryTrainer",
    template="own attempt",
    settings={"include_own_attempt": True, "use_successful_as_teacher": False},
    hears=True,
)

# the paper's settings for its runs with feedback; each arm below shows its teacher something else
RICH = {"distillation_alpha": 1.0, "distillation_topk": 20, "teacher_update_rate": 0.01}
SDPO_SIBLING = Arm(
    "sdpo_sibling",
    "SDPO, sibling",
    "SDPOTrainer",
    template="sdpo",
    settings=RICH,
)
SDPO_FEEDBACK = Arm(
    "sdpo_feedback",
    "SDPO, message",
    "SDPOTrainer",
    template="sdpo",
    settings={**RICH, "use_successful_as_teacher": False},
    hears=True,
)
SDPO_ATTEMPT = Arm(
    "sdpo_attempt",
    "SDPO, message and own attempt",
    "SDPOTrainer",
    template="sdpo",
    settings={**RICH, "use_successful_as_teacher": False, "include_own_attempt": True},
    hears=True,
)
# the official runs': the message is left out beside a sibling's solution
SDPO_EITHER = Arm(
    "sdpo_either",
    "SDPO, sibling or else message",
    "SDPOTrainer",
    template="sdpo",
    settings=RICH,
    hears=True,
)
SDPO_BOTH = Arm(
    "sdpo_both",
    "SDPO, sibling and message",
    "SDPOTrainer",
    template="sdpo",
    settings={**RICH, "environment_feedback_only_without_solution": False},
    hears=True,
)
