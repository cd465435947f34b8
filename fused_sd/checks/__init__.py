"""What a caller must satisfy, and the wording of every error.

A message says the rule, the value and the remedy.  Only shapes, dtypes, devices and Python numbers
are read; values of tensors are read on the CPU alone, where reading does not wait for a device.
"""

import math
from collections.abc import Collection, Iterable, Sequence


def fail(argument: str, rule: str, got: object, remedy: str) -> None:
    """Raise the one kind of error that a caller sees."""
    raise ValueError(f"{argument} must {rule}, got {got}; {remedy}")


def check_number(argument: str, value: object, rule: str, ok: bool, remedy: str) -> None:
    if not isinstance(value, int | float) or isinstance(value, bool) or not ok:
        fail(argument, rule, repr(value), remedy)


def check_positive(argument: str, value: object, remedy: str = "pass 1.0 to leave it out") -> None:
    ok = isinstance(value, int | float) and 0 < value < math.inf
    check_number(argument, value, "be a finite number above 0", ok, remedy)


def check_finite(argument: str, value: object, remedy: str) -> None:
    ok = isinstance(value, int | float) and -math.inf < value < math.inf
    check_number(argument, value, "be a finite number", ok, remedy)


def check_non_negative(argument: str, value: object, remedy: str) -> None:
    ok = isinstance(value, int | float) and 0 <= value < math.inf
    check_number(argument, value, "be a finite number of at least 0", ok, remedy)


def check_unit_interval(argument: str, value: object) -> None:
    ok = isinstance(value, int | float) and 0 <= value <= 1
    check_number(argument, value, "lie in [0, 1]", ok, "it is the share of one of two parts")


def check_positive_int(argument: str, value: object) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        fail(argument, "be an integer of at least 1", repr(value), "pass the number of entries")


def check_beta(beta: object) -> None:
    if isinstance(beta, int | float) and beta in (0, 1):
        name = "forward_kl" if beta == 0 else "reverse_kl"
        fail(
            "beta",
            "lie in the open interval (0, 1)",
            repr(beta),
            f'the divergence tends to 0 there: pass divergence="{name}", the KL that is meant',
        )
    ok = isinstance(beta, int | float) and 0 < beta < 1
    check_number(
        "beta", beta, "lie in the open interval (0, 1)", ok, "0.5 weighs both sides equally"
    )


def check_one_of(argument: str, value: object, legal: Collection[str]) -> None:
    if value not in legal:
        fail(
            argument, f"be one of {', '.join(map(repr, legal))}", repr(value), "choose one of them"
        )


def check_divergence_name(divergence: object) -> None:
    if divergence in ("jsd", "generalized_jsd"):
        fail("divergence", "carry its beta", repr(divergence), "pass Jsd(beta)")
    if divergence in ("mixed", "mixed_kl"):
        fail("divergence", "carry its weight", repr(divergence), "pass MixedKl(forward_weight)")
    if divergence not in ("forward_kl", "reverse_kl"):
        fail(
            "divergence",
            'be "forward_kl", "reverse_kl", Jsd(beta) or MixedKl(forward_weight)',
            repr(divergence),
            "forward is KL(teacher||student), reverse is KL(student||teacher)",
        )


def check_vocabularies(
    student: int,
    teacher: int,
    infinite_if_student_smaller: bool,
    infinite_if_teacher_smaller: bool,
) -> None:
    """A KL is infinite where its first argument has mass on ids that the other side lacks."""
    if student < teacher and infinite_if_student_smaller:
        fail(
            "teacher_head",
            f"have no tokens beyond the student's {student} for a KL from the teacher",
            teacher,
            f"the KL is infinite on them: pass LMHead(weight, valid_vocab={student}) there",
        )
    if teacher < student and infinite_if_teacher_smaller:
        fail(
            "student_head",
            f"have no tokens beyond the teacher's {teacher} for a KL from the student",
            student,
            f"the KL is infinite on them: pass LMHead(weight, valid_vocab={teacher}) there",
        )


def check_support_size(name: str, k: int, vocab: int) -> None:
    if k > vocab:
        fail(
            f"{name}.k",
            f"be at most the vocabulary's {vocab}",
            k,
            "use FULL_VOCABULARY to compare every entry",
        )


def check_ratio_clip(ratio_clip: object) -> None:
    ok = (
        isinstance(ratio_clip, Sequence)
        and len(ratio_clip) == 2
        and all(isinstance(c, int | float) and c >= 0 for c in ratio_clip)
        and ratio_clip[0] <= 1
    )
    if not ok:
        fail(
            "ratio_clip",
            "be (low, high) with 0 <= low <= 1 and high >= 0",
            repr(ratio_clip),
            "the ratio is clipped to [1 - low, 1 + high]; pass None for no clip",
        )


def check_backend_choice(backend: object) -> None:
    check_one_of("backend", backend, ("auto", "triton", "torch"))


def check_reduction(reduction: object) -> None:
    check_one_of("reduction", reduction, ("sum", "mean", "none"))


def check_metrics(metrics: object, legal: Collection[str]) -> None:
    if isinstance(metrics, str) or not isinstance(metrics, Iterable):
        fail("metrics", "be a sequence of names", repr(metrics), f"pass ({metrics!r},)")
    assert isinstance(metrics, Iterable)
    for name in metrics:
        check_one_of("metrics", name, legal)


def check_evidence(has_evidence: bool, has_states: bool, has_log_probs: bool) -> None:
    """Evidence has one teacher, and a teacher has a use."""
    if has_states and has_log_probs:
        fail(
            "teacher",
            "be given once",
            "teacher and teacher_log_probs",
            "pass its states and head, or its log-probabilities",
        )
    if has_evidence and not (has_states or has_log_probs):
        fail(
            "evidence",
            "come with a teacher",
            "none",
            "pass teacher=(hidden, head) or teacher_log_probs",
        )
    if not has_evidence and (has_states or has_log_probs):
        fail("teacher", "come with evidence", "none", "pass evidence=Evidence(...)")


def check_kl(coefficient: object, estimator: object, has_reference: bool) -> None:
    check_non_negative("kl_coefficient", coefficient, "pass 0 for no KL")
    if estimator in ("kl", "k1_direct", "direct"):
        fail(
            "kl_estimator",
            "not differentiate log_prob - reference directly: its gradient does not depend on the "
            "reference",
            repr(estimator),
            "pass 'k1' (sg(d) log_prob), 'k2' or 'k3'",
        )
    check_one_of("kl_estimator", estimator, ("k1", "k2", "k3"))
    if bool(coefficient) != has_reference:
        fail(
            "reference_log_probs",
            "come together with kl_coefficient > 0",
            f"kl_coefficient={coefficient!r}, reference {'given' if has_reference else 'missing'}",
            "pass both or neither",
        )


def check_run(reduction: str, temperature: float) -> None:
    """Check what a loss makes of its logits and of its tokens."""
    check_reduction(reduction)
    check_positive("temperature", temperature)
