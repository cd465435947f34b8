"""The losses that can be planned, by name: for each, the choices that decide memory and GEMMs."""

import dataclasses
from typing import Any, NamedTuple

from fused_sd import checks
from fused_sd.measuring.losses import LOSSES, loss_name
from fused_sd.terms.comparison import Comparison
from fused_sd.terms.divergence import DIVERGENCES, Divergence, Jsd, MixedKl
from fused_sd.terms.divergence_term import named_divergence
from fused_sd.terms.support import (
    NAMED_SUPPORTS,
    GivenEntries,
    StudentTopK,
    Support,
    TeacherTopK,
    named_support,
)


class PlannedObjective(NamedTuple):
    """The choices of one loss that decide its memory and its GEMMs."""

    name: str
    comparison: Comparison | None = None  # None: a loss of the sampled token
    has_teacher: bool = True  # whether it takes a teacher's hidden states
    is_per_token: bool = False  # whether it returns one value a token, never their weighted sum

    @property
    def is_full(self) -> bool:
        """Whether it compares every entry of the vocabulary."""
        return self.comparison is not None and not self.comparison.support.is_truncated

    @property
    def compared(self) -> str:
        """What is compared, in words; "" for a loss of the sampled token."""
        if self.comparison is None:
            return ""
        chosen = self.comparison
        remainder = f", remainder {chosen.remainder}" if chosen.support.is_truncated else ""
        cut = "" if chosen.entry_clip is None else f", each entry cut at {chosen.entry_clip}"
        return f"{chosen.divergence} on {chosen.support}{remainder}{cut}"

    @property
    def truncated(self) -> Support | None:
        """The support of a divergence that compares some entries only."""
        if self.comparison is None or self.is_full:
            return None
        return self.comparison.support


def _comparisons() -> dict[str, Comparison]:
    return {
        "sdpo": Comparison(Jsd(0.5), StudentTopK(100), "tail"),
        "sd_zero": Comparison(MixedKl(0.5), TeacherTopK(64), "renormalize"),
        "sd_zero_paper": Comparison("reverse_kl"),
        "opsd": Comparison("forward_kl", entry_clip=0.05),
        "sdft": Comparison("forward_kl"),
        "gkd": Comparison(Jsd(0.5)),
        "forward_kl": Comparison("forward_kl"),
        "reverse_kl": Comparison("reverse_kl"),
        "jsd": Comparison(Jsd(0.5)),
        "divergence": Comparison("reverse_kl"),
    }


# the losses with their defaults
OBJECTIVES: dict[str, PlannedObjective] = {
    **{name: PlannedObjective(name, comparison) for name, comparison in _comparisons().items()},
    "topk_divergence": PlannedObjective(  # a server's entries, as many as verl's default
        "topk_divergence", Comparison("forward_kl", GivenEntries(32)), has_teacher=False
    ),
    "rlsd": PlannedObjective("rlsd"),
    "rlcsd": PlannedObjective("rlcsd", has_teacher=False),  # takes teachers' log-probabilities
    "sampled_kl": PlannedObjective("sampled_kl"),
    "grpo": PlannedObjective("grpo", has_teacher=False),
    "cross_entropy": PlannedObjective("cross_entropy", has_teacher=False),
    "token_log_probs": PlannedObjective("token_log_probs", has_teacher=False, is_per_token=True),
}


# the two that are planned beside the table's: any divergence, and entries that a server returned
GENERIC = tuple(name for name in OBJECTIVES if name not in LOSSES)


def choose(
    name: str,
    divergence: Divergence | None = None,
    support: Support | None = None,
    remainder: str | None = None,
) -> PlannedObjective:
    """Return a named objective, with the divergence, support or remainder replaced if one is given.

    Raises:
        ValueError: the name is unknown, the loss has no such setting, or settings do not go
            together.
    """
    chosen = OBJECTIVES[loss_name("objective", name, GENERIC)]
    given = {"divergence": divergence, "support": support, "remainder": remainder}
    changed: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    if chosen.comparison is None:
        for argument, value in changed.items():
            checks.fail(
                argument,
                "be left out for a loss of the sampled token",
                f"{value!r} for {name!r}",
                "leave it out, or plan objective='divergence'",
            )
        return chosen
    comparison = dataclasses.replace(chosen.comparison, **changed).without_tensors()
    return chosen._replace(comparison=comparison)


def parse_divergence(text: str) -> Divergence:
    """Parse the command line's form: a name of the table, and its parameter as in jsd:0.5."""
    name, _, number = text.partition(":")
    parameter = _numbers(text, number, float, DIVERGENCE_FORMS)
    return named_divergence(name, parameter[0] if parameter else None)


def parse_support(text: str) -> Support:
    """Parse the command line's form: full, student:100, teacher_nucleus:100:0.9 and their like."""
    name, _, rest = text.partition(":")
    count, _, mass = rest.partition(":")
    numbers = [
        *_numbers(text, count, int, SUPPORT_FORMS),
        *_numbers(text, mass, float, SUPPORT_FORMS),
    ]
    return named_support(name, *numbers)


def _numbers(text: str, number: str, kind: type, forms: str) -> list[float]:
    """Parse a number as a list of one, and nothing as an empty list."""
    try:
        return [kind(number)] if number else []
    except ValueError:
        rule = f"have a number ({kind.__name__}) behind its colon"
        checks.fail(repr(text), rule, repr(number), f"write one of {forms}")


DIVERGENCE_FORMS = ", ".join(
    f"{name}:{known.parameter_name.upper()}" if known.parameter_name else name
    for name, known in DIVERGENCES.items()
)
SUPPORT_FORMS = ", ".join(
    name if not kind.is_truncated else f"{name}:K" + (":MASS" if "nucleus" in name else "")
    for name, kind in NAMED_SUPPORTS.items()
)
