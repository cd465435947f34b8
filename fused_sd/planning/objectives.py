"""The losses that can be planned, by name: for each, the choices that decide memory and GEMMs."""

from typing import NamedTuple

from fused_sd import checks
from fused_sd.terms.divergence import Divergence, Jsd, MixedKl, divergence_term
from fused_sd.terms.support import (
    FULL_VOCABULARY,
    FullVocabulary,
    StudentTopK,
    Support,
    TeacherTopK,
    TokenIds,
    UnionTopK,
)

_SUPPORT_NAMES: dict[type[StudentTopK] | type[TeacherTopK] | type[UnionTopK], str] = {
    StudentTopK: "student",
    TeacherTopK: "teacher",
    UnionTopK: "union",
}


class PlannedObjective(NamedTuple):
    """The choices of one loss that decide its memory and its GEMMs."""

    name: str
    divergence: str = ""  # a DivergenceTerm's name; "": a loss of the sampled token
    support: str = "full"  # "full", "ids", or whose top-k: "student", "teacher", "union"
    k: int = 0  # entries of the support; 0: the whole vocabulary
    remainder: str = "tail"
    entry_clip: bool = False
    has_teacher: bool = True  # whether it takes a teacher's hidden states
    is_per_token: bool = False  # whether it returns one value a token, never their weighted sum

    @property
    def is_divergence(self) -> bool:
        """Whether the loss compares two distributions."""
        return bool(self.divergence)


def _divergences() -> dict[str, PlannedObjective]:
    sdpo = PlannedObjective("sdpo", "jsd", "student", 100, "tail")
    sd_zero = PlannedObjective("sd_zero", "mixed_kl", "teacher", 64, "renormalize")
    full = {"sdft": "forward_kl", "gkd": "jsd", "forward_kl": "forward_kl"}
    full |= {"reverse_kl": "reverse_kl", "jsd": "jsd", "divergence": "reverse_kl"}
    return {
        "sdpo": sdpo,
        "sd_zero": sd_zero,
        "opsd": PlannedObjective("opsd", "forward_kl", entry_clip=True),
        **{name: PlannedObjective(name, divergence) for name, divergence in full.items()},
        "topk_divergence": PlannedObjective(  # a server's entries, as many as verl's default
            "topk_divergence", "forward_kl", "ids", 32, "tail", has_teacher=False
        ),
        "topk_tail": sdpo._replace(name="topk_tail"),
        "topk_renormalized": sd_zero._replace(name="topk_renormalized"),
    }


# the losses with their defaults, and the objectives of ``fused_sd bench``
OBJECTIVES: dict[str, PlannedObjective] = {
    **_divergences(),
    "rlsd": PlannedObjective("rlsd"),
    "rlcsd": PlannedObjective("rlcsd", has_teacher=False),  # takes teachers' log-probabilities
    "grpo": PlannedObjective("grpo", has_teacher=False),
    "cross_entropy": PlannedObjective("cross_entropy", has_teacher=False),
    "token_log_probs": PlannedObjective("token_log_probs", has_teacher=False, is_per_token=True),
}


def choose(
    name: str,
    divergence: Divergence | None = None,
    support: Support | None = None,
    remainder: str | None = None,
) -> PlannedObjective:
    """Return a named objective, with the divergence, support or remainder replaced if one is given.

    Raises:
        ValueError: the name is unknown, or the loss has no such setting.
    """
    checks.check_one_of("objective", name, OBJECTIVES)
    chosen = OBJECTIVES[name]
    for argument, value in (
        ("divergence", divergence),
        ("support", support),
        ("remainder", remainder),
    ):
        if value is not None and not chosen.is_divergence:
            checks.fail(
                argument,
                "be left out for a loss of the sampled token",
                f"{value!r} for {name!r}",
                "leave it out, or plan objective='divergence'",
            )
    if divergence is not None:
        chosen = chosen._replace(divergence=divergence_term(divergence).name)
    if support is not None:
        kind, k = _support(support)
        chosen = chosen._replace(support=kind, k=k)
    if remainder is not None:
        legal = ("tail", "renormalize", "drop", "teacher_renormalize")
        checks.check_one_of("remainder", remainder, legal)
        chosen = chosen._replace(remainder=remainder)
    return chosen


def _support(support: Support) -> tuple[str, int]:
    """Return the support's name and number of entries."""
    if isinstance(support, FullVocabulary):
        return "full", 0
    if isinstance(support, TokenIds):
        return "ids", support.ids.shape[-1]
    if not isinstance(support, StudentTopK | TeacherTopK | UnionTopK):
        checks.fail(
            "support",
            "be FULL_VOCABULARY, StudentTopK(k), TeacherTopK(k), UnionTopK(k) or TokenIds(ids)",
            repr(support),
            "choose one of them",
        )
    return _SUPPORT_NAMES[type(support)], support.k


def parse_divergence(text: str) -> Divergence:
    """Parse the command line's form: forward_kl, reverse_kl, jsd:0.5 or mixed_kl:0.5."""
    name, _, number = text.partition(":")
    if name in ("forward_kl", "reverse_kl") and not number:
        return name
    kinds: dict[str, type[Jsd] | type[MixedKl]] = {"jsd": Jsd, "mixed_kl": MixedKl}
    try:
        return kinds[name](float(number))
    except (KeyError, ValueError):
        checks.fail(
            "divergence",
            "be forward_kl, reverse_kl, jsd:BETA or mixed_kl:WEIGHT",
            text,
            "BETA lies in (0, 1), WEIGHT in [0, 1]",
        )
        raise


def parse_support(text: str) -> Support:
    """Parse the command line's form: full, student:100, teacher:64 or union:50."""
    name, _, number = text.partition(":")
    if name == "full" and not number:
        return FULL_VOCABULARY
    kinds: dict[str, type[StudentTopK] | type[TeacherTopK] | type[UnionTopK]] = {
        kind: support for support, kind in _SUPPORT_NAMES.items()
    }
    try:
        return kinds[name](int(number))
    except (KeyError, ValueError):
        checks.fail(
            "support",
            "be full, student:K, teacher:K or union:K",
            text,
            "K is the number of entries",
        )
        raise
