"""Which settings go together: the tables that decide, and that the tests walk."""

from collections.abc import Mapping
from typing import NamedTuple

from fused_sd import checks

DIVERGENCES = ("forward_kl", "reverse_kl", "jsd", "mixed_kl")
SUPPORTS = ("full", "student", "teacher", "union", "ids", "entries")  # entries: ids and log-probs
REMAINDERS = ("tail", "renormalize", "drop", "teacher_renormalize")


class Refusal(NamedTuple):
    """A combination that is refused, and why."""

    when: Mapping[str, tuple[object, ...]]  # setting -> values; all must hold
    reason: str
    remedy: str


REFUSALS = (
    Refusal(
        {"support": ("full",), "remainder": ("renormalize", "drop", "teacher_renormalize")},
        "the full vocabulary leaves no remainder",
        "choose a truncated support, or leave remainder out",
    ),
    Refusal(
        {
            "remainder": ("teacher_renormalize",),
            "divergence": ("reverse_kl", "jsd", "mixed_kl"),
        },
        "a teacher that is renormalised against a student that is not gives a cross entropy, which "
        "only a KL from the teacher is",
        'pass divergence="forward_kl", or remainder="renormalize"',
    ),
    Refusal(
        {"remainder": ("teacher_renormalize",), "entry_clip": (True,)},
        "an entry clip bounds the terms of a divergence, and these are of a cross entropy",
        'pass remainder="renormalize" or "drop"',
    ),
    Refusal(
        {"support": ("full",), "tail_floor": (True,)},
        "the full vocabulary has no tail",
        "pass tail_floor=None",
    ),
    Refusal(
        {"remainder": ("renormalize", "drop", "teacher_renormalize"), "tail_floor": (True,)},
        "there is no tail bucket to floor",
        'pass remainder="tail" or tail_floor=None',
    ),
    Refusal(
        {
            "remainder": ("tail", "renormalize", "teacher_renormalize"),
            "log_prob_floor": (True,),
        },
        "log-probabilities that are raised to a floor no longer sum to 1 with the others",
        'pass remainder="drop" or log_prob_floor=None',
    ),
)

# what a metric needs of the call, beside the student's logits
METRIC_NEEDS: dict[str, tuple[str, ...]] = {
    "forward_kl": ("teacher states",),
    "reverse_kl": ("teacher states",),
    "jsd": ("teacher states",),
    "student_entropy": (),
    "teacher_entropy": ("teacher states",),
    "top1_agreement": ("teacher states",),
    "student_mass": ("truncated support",),
    "teacher_mass": ("truncated support",),
    "student_tail_mass": ("truncated support",),
    "teacher_tail_mass": ("truncated support",),
    "topk_overlap": ("teacher states", "top-k support"),
    "student_log_prob": ("token_ids",),
    "teacher_log_prob": ("token_ids", "teacher states"),
    "entry_clip_fraction": ("entry_clip",),
    "token_clip_fraction": ("token_clip",),
    "importance_ratio": ("importance",),
    "importance_cap_fraction": ("importance",),
}

NEED_REMEDIES = {
    "teacher states": "call divergence_loss with the teacher's hidden states and head",
    "truncated support": "pass StudentTopK, TeacherTopK, UnionTopK or TokenIds as support",
    "top-k support": "pass StudentTopK, TeacherTopK or UnionTopK as support",
    "token_ids": "pass token_ids, the sampled tokens",
    "entry_clip": "pass entry_clip",
    "token_clip": "pass token_clip",
    "importance": "pass importance=ImportanceCap(...)",
}


def refusal(settings: Mapping[str, object]) -> Refusal | None:
    """The first reason against a combination, or None where it works."""
    for entry in REFUSALS:
        if all(settings[name] in values for name, values in entry.when.items()):
            return entry
    return None


def check_combination(
    divergence: str,
    support: str,
    remainder: str,
    *,
    entry_clip: bool,
    tail_floor: bool,
    log_prob_floor: bool,
) -> None:
    """Refuse settings that do not go together, with the reason."""
    checks.check_one_of("remainder", remainder, REMAINDERS)
    settings = {
        "divergence": divergence,
        "support": support,
        "remainder": remainder,
        "entry_clip": entry_clip,
        "tail_floor": tail_floor,
        "log_prob_floor": log_prob_floor,
    }
    entry = refusal(settings)
    if entry is not None:
        named = ", ".join(f"{name}={settings[name]!r}" for name in entry.when)
        checks.fail("settings", f"go together ({entry.reason})", named, entry.remedy)


def check_metric_needs(metrics: tuple[str, ...], given: Mapping[str, bool]) -> None:
    """Refuse a metric that the call cannot form."""
    for name in metrics:
        for need in METRIC_NEEDS[name]:
            if not given[need]:
                checks.fail("metrics", f"have {need} for {name!r}", "none", NEED_REMEDIES[need])
