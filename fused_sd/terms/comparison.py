"""What a divergence loss compares: one object that holds its settings and checks that they fit.

The tables here list what is allowed.  A divergence or a support that nobody has thought about is
therefore refused, with the reason, and never computed as something else.
"""

import dataclasses
from dataclasses import dataclass
from typing import NamedTuple

from fused_sd import checks
from fused_sd.settings import setting
from fused_sd.terms.divergence import Divergence
from fused_sd.terms.divergence_term import DivergenceTerm, divergence_term
from fused_sd.terms.support import FULL_VOCABULARY, LEGAL_SUPPORTS, Remainder, SideName, Support

TokenClip = float | tuple[float | None, float | None] | None


class RemainderRule(NamedTuple):
    """Which settings have a meaning beside a remainder."""

    tail_floor: bool
    log_prob_floor: bool
    entry_clip: bool


# What becomes of the entries outside a truncated support, and what may be set beside it.
REMAINDERS: dict[str, RemainderRule] = {
    "tail": RemainderRule(tail_floor=True, log_prob_floor=False, entry_clip=True),
    "renormalize": RemainderRule(tail_floor=False, log_prob_floor=False, entry_clip=True),
    "drop": RemainderRule(tail_floor=False, log_prob_floor=True, entry_clip=True),
    "teacher_renormalize": RemainderRule(tail_floor=False, log_prob_floor=False, entry_clip=False),
}
FULL_RULE = RemainderRule(tail_floor=False, log_prob_floor=False, entry_clip=True)

# Why a setting that the rule does not allow has no meaning, and what to pass instead.
REASONS: dict[str, tuple[str, str]] = {
    "tail_floor": (
        "there is no tail bucket whose mass a floor could bound",
        'pass a truncated support with remainder="tail", or tail_floor=None',
    ),
    "log_prob_floor": (
        "log-probabilities that are raised to a floor no longer sum to 1 with the others",
        'pass remainder="drop" or log_prob_floor=None',
    ),
    "entry_clip": (
        "an entry clip bounds the terms of a divergence, and these are of a cross entropy",
        'pass remainder="renormalize" or "drop"',
    ),
}
NO_REMAINDER = (
    "the full vocabulary leaves no remainder",
    "choose a truncated support, or leave remainder out",
)
CROSS_ENTROPY = (
    "a teacher that is renormalised against a student that is not gives a cross entropy, which "
    "only a KL from the teacher is",
    'pass divergence="forward_kl", or remainder="renormalize"',
)
NOT_DEFINED = (
    "the divergence has no definition with this remainder",
    "pass FULL_VOCABULARY, or list the remainder in the divergence's row of DIVERGENCES",
)


@setting
@dataclass(frozen=True)
class Comparison:
    """The settings of a divergence loss, beside its tensors: what is compared, and how.

    Args:
        divergence: a name or an instance of a class of ``DIVERGENCES``.
        support: the entries that are compared.
        remainder: what becomes of the other entries of a truncated support.
        tail_floor: lower bound of what the support leaves to the tail bucket (SDPO's 1e-7).
        log_prob_floor: lower bound of both sides' log-probabilities, nats (verl's clamp).
        entry_clip: upper bound of each entry's term, before the sum over the vocabulary.
        token_clip: upper bound, or (lower, upper), of each token's loss, after the sum.

    Raises:
        ValueError: when a number is out of range or settings do not go together.

    Examples:
        >>> import fused_sd
        >>> found = fused_sd.Comparison("forward_kl", fused_sd.StudentTopK(100), tail_floor=1e-7)
        >>> found.remainder
        'tail'
        >>> fused_sd.Comparison("reverse_kl", tail_floor=1e-7)  # the full vocabulary has no tail
        Traceback (most recent call last):
        ValueError: settings must go together ...
    """

    divergence: Divergence = "reverse_kl"
    support: Support = FULL_VOCABULARY
    remainder: Remainder = "tail"
    tail_floor: float | None = None
    log_prob_floor: float | None = None
    entry_clip: float | None = None
    token_clip: TokenClip = None

    def __post_init__(self) -> None:
        term = self.term
        if not isinstance(self.support, Support):
            checks.fail("support", f"be {LEGAL_SUPPORTS}", repr(self.support), "pass one of them")
        checks.check_one_of("remainder", self.remainder, REMAINDERS)
        if self.entry_clip is not None:
            checks.check_positive("entry_clip", self.entry_clip, "pass None for no clip")
        if self.tail_floor is not None:
            checks.check_positive("tail_floor", self.tail_floor, "pass None for the exact tail")
        if self.log_prob_floor is not None:
            checks.check_finite("log_prob_floor", self.log_prob_floor, "pass None for no floor")
        _check_bounds(self.token_clip)
        truncated, rule = self.support.is_truncated, FULL_RULE
        if not truncated and self.remainder != "tail":
            self._refuse(NO_REMAINDER, "support", "remainder")
        if truncated:
            rule = REMAINDERS[self.remainder]
            if self.remainder not in term.definition.remainders:
                is_cross = self.remainder == "teacher_renormalize"
                why = CROSS_ENTROPY if is_cross else NOT_DEFINED
                self._refuse(why, "divergence", "remainder")
        for name, is_allowed in zip(rule._fields, rule, strict=True):
            if getattr(self, name) is not None and not is_allowed:
                self._refuse(REASONS[name], "support", "remainder", name)

    def _refuse(self, why: tuple[str, str], *names: str) -> None:
        reason, remedy = why
        got = ", ".join(f"{name}={getattr(self, name)!r}" for name in names)
        checks.fail("settings", f"go together ({reason})", got, remedy)

    @property
    def term(self) -> DivergenceTerm:
        """The divergence's row of the table, with its parameter."""
        return divergence_term(self.divergence)

    @property
    def token_bounds(self) -> tuple[float | None, float | None] | None:
        """(lower, upper) bound of a token's loss; None: no bound."""
        clip = self.token_clip
        return clip if clip is None or isinstance(clip, tuple) else (None, clip)

    def without_tensors(self) -> "Comparison":
        """The same comparison for an operator, which takes the support's ids as an input."""
        return dataclasses.replace(self, support=self.support.without_tensors())

    def check_vocabularies(self, student: int, teacher: int) -> None:
        """Refuse two vocabularies between which the divergence is infinite, or too large a support.

        A KL is infinite where only its first argument has mass: on entries that one side lacks, if
        all are compared or the other side chooses them.
        """
        support = self.support
        if support.is_truncated:
            support.check_size(min(student, teacher))
        sides: tuple[tuple[SideName, int, SideName, int], ...]
        sides = ("student", student, "teacher", teacher), ("teacher", teacher, "student", student)
        for lacking, size, other, larger in sides:
            is_compared = not support.is_truncated or support.chooses(other)
            if size < larger and is_compared and lacking in self.term.definition.infinite_without:
                checks.fail(
                    f"{other}_head",
                    f"have no tokens beyond the {size} of {lacking}_head for a KL from the {other}",
                    larger,
                    f"the KL is infinite on them: pass LMHead(weight, valid_vocab={size}) there",
                )

    def num_given(self, student: int, teacher: int) -> int:
        """Size of the vocabulary of given ids, beyond which the divergence is infinite."""
        sizes = {"student": student, "teacher": teacher}
        needed = [sizes[side] for side in self.term.definition.infinite_without]
        return min(needed, default=max(sizes.values()))


def _check_bounds(token_clip: TokenClip) -> None:
    if token_clip is None:
        return
    bounds = token_clip if isinstance(token_clip, tuple) else (None, token_clip)
    if len(bounds) != 2:
        checks.fail("token_clip", "be (lower, upper)", token_clip, "pass None for a missing one")
    for bound in bounds:
        if bound is not None:
            checks.check_finite("token_clip", bound, "pass a bound or (lower, upper)")
    low, high = bounds
    if (low is None and high is None) or (low is not None and high is not None and low >= high):
        checks.fail("token_clip", "be (lower, upper) with lower < upper", token_clip, "order them")
