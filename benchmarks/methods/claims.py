"""The papers' claims and the contrasts that try them, written down before the final runs."""

from dataclasses import dataclass

from benchmarks.methods.outcomes import Contrast

SDPO, SD_ZERO, RLSD = "SDPO (2601.20802)", "SD-Zero (2604.12002)", "RLSD (2604.03128)"
OPSD = "OPSD (2601.18734)"
CHANCE = 1 / 6  # the planted error is one of six digits


@dataclass(frozen=True)
class Claim:
    """A paper's claim and what is measured for it.

    Attributes:
        name: The name of its block on the page and of its picture.
        paper: The method and its paper.
        says: The claim in a few words.
        experiment: The name of the experiment.
        contrasts: The numbers that decide.
        pictured: The quantity that the picture shows over the generations; None: no picture.
    """

    name: str
    paper: str
    says: str
    experiment: str
    contrasts: tuple[Contrast, ...]
    pictured: str | None = "accuracy"

    @property
    def arms(self) -> tuple[str, ...]:
        """The arms that the contrasts name, in their order."""
        named = [arm for c in self.contrasts for arm in (c.arm, c.against) if arm is not None]
        return tuple(dict.fromkeys(named))


CLAIMS = (
    Claim(
        "sdpo-samples",
        SDPO,
        "With rich feedback, SDPO needs fewer generations than GRPO",
        "programs",
        (
            Contrast("generations", "sdpo_either", "grpo", sign=-1),
            Contrast("generations", "sdpo_feedback", "grpo", sign=-1),
        ),
    ),
    Claim(
        "sdpo-end",
        SDPO,
        "With rich feedback, SDPO ends above GRPO",
        "programs",
        (
            Contrast("accuracy", "sdpo_either", "grpo"),
            Contrast("sampled accuracy", "sdpo_either", "grpo"),
        ),
        "sampled_accuracy",
    ),
    Claim(
        "sdpo-context",
        SDPO,
        "A sibling and a message teach more than either alone",
        "programs",
        (
            Contrast("mean accuracy", "sdpo_both", "sdpo_sibling"),
            Contrast("mean accuracy", "sdpo_both", "sdpo_feedback"),
        ),
    ),
    Claim(
        "sdpo-length",
        SDPO,
        "SDPO's answers become shorter than GRPO's",
        "programs",
        (
            Contrast("length", "sdpo_either", "grpo", sign=-1),
            Contrast("length", "sdpo_sibling", "grpo", sign=-1),
        ),
        "length",
    ),
    Claim(
        "sdpo-siblings",
        SDPO,
        "Without feedback, successful siblings lift SDPO above GRPO",
        "addition",
        (Contrast("accuracy", "sdpo", "grpo"),),
    ),
    Claim(
        "sdpo-discovery",
        SDPO,
        "At test time, self-distillation finds what sampling and conversation do not",
        "discovery",
        (
            Contrast("found in 512", "test_time", "best_of_k"),
            Contrast("found in 512", "test_time", "multi_turn"),
            Contrast("found in 64", "test_time", "best_of_k"),
            Contrast("found in 64", "test_time", "multi_turn"),
        ),
        "probability",
    ),
    Claim(
        "sdpo-size",
        SDPO,
        "SDPO's lead over GRPO grows with the model",
        "size-3M",
        (
            Contrast("accuracy", "sdpo", "grpo"),
            Contrast("accuracy", "sdpo", "grpo", beyond="addition"),
            Contrast("accuracy", "sdpo", "grpo", beyond="size-0.4M"),
        ),
    ),
    Claim(
        "sd-zero-gain",
        SD_ZERO,
        "SD-Zero gains 10 points and ends above RFT, GRPO and SDFT",
        "self-revision",
        (
            Contrast("gain", "sd_zero_joint", margin=0.1),
            Contrast("accuracy", "sd_zero_joint", "rft"),
            Contrast("accuracy", "sd_zero_joint", "grpo"),
            Contrast("accuracy", "sd_zero_joint", "sdft"),
        ),
    ),
    Claim(
        "sd-zero-phases",
        SD_ZERO,
        "Both phases together end above each alone",
        "self-revision",
        (
            Contrast("accuracy", "sd_zero_joint", "srt"),
            Contrast("accuracy", "sd_zero_joint", "sd_zero"),
        ),
    ),
    Claim(
        "sd-zero-joint",
        SD_ZERO,
        "The paper's joint phase 1 does no worse than the official code's stages",
        "self-revision",
        (Contrast("accuracy", "sd_zero_joint", "sd_zero_sequential", margin=-0.02),),
    ),
    Claim(
        "sd-zero-end",
        "here",
        "A reviser that reads attempts as phase 1 wrote them, without end, teaches better",
        "self-revision",
        (Contrast("accuracy", "sd_zero_bare", "sd_zero_joint"),),
    ),
    Claim(
        "sd-zero-again",
        SD_ZERO,
        "A second round with a renewed teacher still gains",
        "self-revision",
        (Contrast("accuracy", "sd_zero_synced", "sd_zero_bare"),),
    ),
    Claim(
        "sd-zero-localisation",
        SD_ZERO,
        "The reviser's blame lies on the tokens that are wrong",
        "self-revision",
        (
            Contrast("blame on likely errors, after phase 1", "sd_zero_joint", margin=CHANCE),
            Contrast("blame on slips, after phase 1", "sd_zero_joint", margin=CHANCE),
            Contrast("blame on likely errors, beyond surprise", "sd_zero_joint"),
            Contrast("blame on likely errors, gained by phase 1", "sd_zero_joint"),
        ),
        None,
    ),
    Claim(
        "rlsd-ceiling",
        RLSD,
        "RLSD ends above GRPO",
        "long",
        (Contrast("accuracy", "rlsd", "grpo"),),
    ),
    Claim(
        "rlsd-late",
        RLSD,
        "RLSD does not fall late, where OPSD does",
        "long",
        (
            Contrast("late change", "rlsd", margin=-0.02),
            Contrast("late change", "opsd_unclipped", sign=-1, margin=-0.02),
        ),
    ),
    Claim(
        "rlsd-leaks",
        RLSD,
        "RLSD does not leak the reference, where OPSD does",
        "leaks",
        (
            Contrast("leaks", "rlsd", sign=-1, margin=0.02),
            Contrast("leaks", "opsd_unclipped", margin=0.02),
        ),
        "leaks",
    ),
    Claim(
        "rlsd-entropy",
        RLSD,
        "RLSD keeps more entropy than GRPO",
        "addition",
        (Contrast("entropy", "rlsd", "grpo"),),
        "entropy",
    ),
    Claim(
        "rlsd-pictures",
        RLSD,
        "With images: above GRPO and OPSD, and without OPSD's leaks",
        "pictures",
        (
            Contrast("accuracy", "rlsd", "grpo"),
            Contrast("accuracy", "rlsd", "opsd_unclipped"),
            Contrast("leaks", "rlsd", sign=-1, margin=0.02),
            Contrast("leaks", "opsd_unclipped", margin=0.02),
        ),
    ),
    Claim(
        "opsd-clip",
        OPSD,
        "The clip of each entry at 0.05 helps",
        "addition",
        (Contrast("accuracy", "opsd", "opsd_unclipped"),),
    ),
    Claim(
        "plurals",
        "all",
        "On a model that exists, each method ends above GRPO",
        "plurals",
        (
            Contrast("accuracy", "sdpo", "grpo"),
            Contrast("accuracy", "rlsd", "grpo"),
            Contrast("accuracy", "sdft", "grpo"),
            Contrast("accuracy", "opsd", "grpo"),
        ),
    ),
)
