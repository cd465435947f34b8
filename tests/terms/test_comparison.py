"""Every combination of a comparison: refused with its reason, or equal to the reference."""

import itertools

import pytest
import torch
from cases import make_case
from closeness import assert_close
from divergences import EACH

import fused_sd
from fused_sd import reference
from fused_sd.terms import comparison
from fused_sd.terms.divergence import DIVERGENCES, Definition
from fused_sd.terms.support import NAMED_SUPPORTS

K, MASS = 5, 0.6
SUPPORTS = (*NAMED_SUPPORTS, "ids", "served")
TABLE = [
    row
    for row in itertools.product(
        DIVERGENCES,
        SUPPORTS,
        comparison.REMAINDERS,
        (None, 0.05),
        ({}, {"tail_floor": 1e-7}, {"log_prob_floor": -4.0}),
    )
    if "log_prob_floor" not in row[-1] or row[1] == "served"  # a server's alone have one
]


def make_support(kind, entries):
    if kind in ("ids", "served"):
        return fused_sd.TokenIds(entries)
    numbers = {"full": (), "teacher_nucleus": (K, MASS)}.get(kind, (K,))
    return NAMED_SUPPORTS[kind](*numbers)


def reference_support(kind, student, teacher, entries):
    return {
        "full": lambda: None,
        "student": lambda: reference.student_topk(student, teacher, K),
        "teacher": lambda: reference.teacher_topk(student, teacher, K),
        "union": lambda: reference.union_topk(student, teacher, K),
        "teacher_nucleus": lambda: reference.teacher_nucleus(student, teacher, K, MASS),
        "ids": lambda: reference.given_ids(entries, student.shape[-1]),
        "served": lambda: reference.given_ids(entries, student.shape[-1]),
    }[kind]()


def fused(case, kind, entries, **settings):
    common = {"token_weights": case.token_weights, "chunk_size": 3, "reduction": "sum", **settings}
    if kind != "served":
        return fused_sd.divergence_loss(
            case.hidden,
            case.head,
            case.teacher_hidden,
            case.teacher_head,
            support=make_support(kind, entries),
            **common,
        )
    teacher = reference.logits(case.teacher_hidden, case.teacher_weight)
    log_probs = teacher.log_softmax(-1).gather(-1, entries.clamp(min=0))
    return fused_sd.topk_divergence_loss(case.hidden, case.head, entries, log_probs, **common)


def make_entries(vocab):
    """Ids with one repeated and one of padding."""
    entries = torch.stack([torch.randperm(vocab)[:K] for _ in range(7)])
    entries[2, 3] = entries[2, 0]
    entries[3, 1] = -1
    return entries


def reason_against(divergence, kind, remainder, entry_clip, floors):
    """The table's reason and remedy, written once more as the documentation says it."""
    if kind == "full":
        if remainder != "tail":
            return comparison.NO_REMAINDER
        return comparison.REASONS["tail_floor"] if "tail_floor" in floors else None
    if remainder == "teacher_renormalize" and divergence != "forward_kl":
        return comparison.CROSS_ENTROPY
    if remainder != "tail" and "tail_floor" in floors:
        return comparison.REASONS["tail_floor"]
    if remainder != "drop" and "log_prob_floor" in floors:
        return comparison.REASONS["log_prob_floor"]
    if remainder == "teacher_renormalize" and entry_clip is not None:
        return comparison.REASONS["entry_clip"]
    return None


@pytest.mark.parametrize("divergence, kind, remainder, entry_clip, floors", TABLE)
def test_combination_is_refused_or_equals_the_reference(
    divergence, kind, remainder, entry_clip, floors
):
    case = make_case(bias=True)
    case.teacher_weight = case.teacher_weight.detach()
    entries = make_entries(67)
    settings = {
        "divergence": EACH[divergence][0],
        "remainder": remainder,
        "entry_clip": entry_clip,
        **floors,
    }
    refused = reason_against(divergence, kind, remainder, entry_clip, floors)
    if refused is not None:
        with pytest.raises(ValueError) as error:
            fused(case, kind, entries, **settings)
        reason, remedy = refused
        assert reason in str(error.value)
        assert remedy in str(error.value)
        return
    output = fused(case, kind, entries, **settings)
    found = torch.autograd.grad(output.loss, case.inputs)
    student = reference.logits(case.hidden, case.weight, case.bias)
    teacher = reference.logits(case.teacher_hidden, case.teacher_weight)
    if kind == "served":
        log_probs = teacher.log_softmax(-1).gather(-1, entries.clamp(min=0))
        teacher = reference.served_teacher(entries, log_probs, 67)
    token_loss = reference.divergence(
        student,
        teacher,
        divergence=divergence,
        support=reference_support(kind, student, teacher, entries),
        remainder=remainder,
        entry_clip=entry_clip,
        **floors,
        **EACH[divergence][1],
    )
    expected = torch.autograd.grad((token_loss * case.token_weights).sum(), case.inputs)
    alive = case.token_weights != 0
    assert_close(output.token_loss[alive], token_loss[alive], torch.float64, "token_loss")
    assert (output.token_loss[~alive] == 0).all()
    for name, value, exact in zip(("hidden", "weight", "bias"), found, expected, strict=True):
        assert_close(value, exact, torch.float64, name)


def test_every_reason_is_met():
    met = {reason_against(*row) for row in TABLE} - {None}
    assert met == {
        comparison.NO_REMAINDER,
        comparison.CROSS_ENTROPY,
        *comparison.REASONS.values(),
    }


@pytest.mark.parametrize("remainder", comparison.REMAINDERS)
def test_a_divergence_is_refused_where_its_row_says_nothing(remainder, monkeypatch):
    """A new divergence has no meaning beside a remainder until somebody has written it down."""
    silent = Definition(DIVERGENCES["reverse_kl"].function)
    monkeypatch.setitem(DIVERGENCES, "reverse_kl", silent)
    fused_sd.Comparison("reverse_kl")
    reason = "no definition with this remainder"
    if remainder == "teacher_renormalize":
        reason = "gives a cross entropy"
    with pytest.raises(ValueError, match=reason):
        fused_sd.Comparison("reverse_kl", fused_sd.StudentTopK(3), remainder)


def test_a_comparison_is_what_it_was_given():
    given = fused_sd.Comparison(fused_sd.SkewKl(0.8), fused_sd.TeacherTopK(4), token_clip=2.0)
    assert given.term == ("skew_kl", 0.8)
    assert given.token_bounds == (None, 2.0)
    assert given == fused_sd.Comparison(
        fused_sd.SkewKl(0.8), fused_sd.TeacherTopK(4), token_clip=2.0
    )
    with pytest.raises(AttributeError):
        given.remainder = "drop"


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"divergence": "jsd"}, r"got 'jsd'; pass Jsd\(beta\)"),
        ({"divergence": "skew_kl"}, r"pass SkewKl\(student_weight\)"),
        ({"divergence": "kl"}, "forward is KL"),
        ({"divergence": None}, "divergence must be"),
        ({"support": "full"}, "support must be FULL_VOCABULARY, StudentTopK"),
        ({"support": 5}, "support must be"),
        ({"remainder": "rest"}, "remainder must be one of"),
        ({"entry_clip": 0.0}, "entry_clip must be a finite number above 0"),
        ({"token_clip": (2.0, 1.0)}, "lower < upper"),
        ({"token_clip": (None, None)}, "lower < upper"),
        ({"token_clip": float("nan")}, "token_clip must be a finite number"),
        ({"tail_floor": -1.0}, "tail_floor must be a finite number above 0"),
    ],
    ids=str,
)
def test_what_a_comparison_refuses(settings, message):
    with pytest.raises(ValueError, match=message):
        fused_sd.Comparison(**settings)


@pytest.mark.parametrize("name", NAMED_SUPPORTS)
def test_a_support_knows_itself(name):
    support = make_support(name, None)
    assert support.name == name
    assert support.is_truncated == (name != "full")
    assert support.without_tensors() == support
    with pytest.raises(ValueError):
        fused_sd.TeacherTopK(0)


def test_a_nucleus_counts_what_the_teacher_needs():
    """A sure teacher is compared on one entry, an even one on all that k allows."""
    vocab = 64
    logits = torch.stack([torch.arange(vocab) == 3, torch.zeros(vocab), torch.arange(vocab) < 4])
    weight = torch.eye(vocab, dtype=torch.float64)
    teacher = 20 * logits.double()
    student = torch.randn(3, vocab, dtype=torch.float64, requires_grad=True)
    output = fused_sd.divergence_loss(
        student,
        weight,
        teacher,
        weight,
        divergence="forward_kl",
        support=fused_sd.TeacherNucleus(10, 0.7),
        metrics=("teacher_mass",),
        reduction="sum",
    )
    assert_close(output.metrics["teacher_mass"], torch.tensor([1.0, 10 / 64, 0.75]), torch.float32)
    (gradient,) = torch.autograd.grad(output.loss, student)
    # outside the nucleus the gradient is one constant times the student's softmax
    share = gradient[2, 4:] / student[2].softmax(-1)[4:].detach()
    assert_close(share, share.mean().expand_as(share), torch.float64)


def test_a_clip_fraction_is_of_the_entries_that_are_compared():
    """Places of a nucleus that a token does not need are not compared, and none is cut."""
    vocab = 64
    weight = torch.eye(vocab, dtype=torch.float64)
    teacher = torch.full((1, vocab), -20.0, dtype=torch.float64)
    teacher[0, :2] = torch.tensor([2.0, 1.0])
    student = torch.zeros(1, vocab, dtype=torch.float64)
    output = fused_sd.divergence_loss(
        *(student, weight, teacher, weight),
        divergence="forward_kl",
        support=fused_sd.TeacherNucleus(20, 0.9),
        remainder="drop",
        entry_clip=0.9,  # the first entry's term is 0.73 * ln(0.73 * 64) = 2.8, the second's 0.77
        metrics=("entry_clip_fraction",),
        reduction="sum",
    )
    assert output.metrics["entry_clip_fraction"].item() == 0.5
