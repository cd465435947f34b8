"""Every combination of the table: refused with its reason, or equal to the reference."""

import itertools

import pytest
import torch
from cases import make_case
from closeness import assert_close

import fused_sd
from fused_sd import reference
from fused_sd.terms import combinations

DIVERGENCES = {
    "forward_kl": "forward_kl",
    "reverse_kl": "reverse_kl",
    "jsd": fused_sd.Jsd(0.3),
    "mixed_kl": fused_sd.MixedKl(0.4),
}
SETTINGS = {"jsd": {"beta": 0.3}, "mixed_kl": {"forward_weight": 0.4}}
K = 5
NAMES = ("divergence", "support", "remainder", "entry_clip", "tail_floor", "log_prob_floor")
TABLE = [
    row
    for row in itertools.product(
        combinations.DIVERGENCES,
        combinations.SUPPORTS,
        combinations.REMAINDERS,
        (None, 0.05),
        ({}, {"tail_floor": 1e-7}, {"log_prob_floor": -4.0}),
    )
    if "log_prob_floor" not in row[-1] or row[1] == "entries"  # a server's alone have one
]


def supports(case, kind, entries):
    return {
        "full": fused_sd.FULL_VOCABULARY,
        "student": fused_sd.StudentTopK(K),
        "teacher": fused_sd.TeacherTopK(K),
        "union": fused_sd.UnionTopK(K),
        "ids": fused_sd.TokenIds(entries),
    }[kind]


def reference_support(kind, student, teacher, entries):
    return {
        "full": lambda: None,
        "student": lambda: reference.student_topk(student, teacher, K),
        "teacher": lambda: reference.teacher_topk(student, teacher, K),
        "union": lambda: reference.union_topk(student, teacher, K),
        "ids": lambda: reference.given_ids(entries, student.shape[-1]),
        "entries": lambda: reference.given_ids(entries, student.shape[-1]),
    }[kind]()


def fused(case, kind, entries, **settings):
    common = {"token_weights": case.token_weights, "chunk_size": 3, **settings}
    if kind != "entries":
        support = supports(case, kind, entries)
        return fused_sd.divergence_loss(
            case.hidden,
            case.head,
            case.teacher_hidden,
            case.teacher_head,
            support=support,
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


@pytest.mark.parametrize("divergence, kind, remainder, entry_clip, floor", TABLE)
def test_combination_is_refused_or_equals_the_reference(
    divergence, kind, remainder, entry_clip, floor
):
    case = make_case(bias=True)
    case.teacher_weight = case.teacher_weight.detach()
    entries = make_entries(67)
    settings = {
        "divergence": DIVERGENCES[divergence],
        "remainder": remainder,
        "entry_clip": entry_clip,
        **floor,
    }
    row = {
        "divergence": divergence,
        "support": kind,
        "remainder": remainder,
        "entry_clip": entry_clip is not None,
        "tail_floor": "tail_floor" in floor,
        "log_prob_floor": "log_prob_floor" in floor,
    }
    refusal = combinations.refusal(row)
    if refusal is not None:
        with pytest.raises(ValueError) as error:
            fused(case, kind, entries, **settings)
        assert refusal.reason in str(error.value)
        assert refusal.remedy in str(error.value)
        return
    output = fused(case, kind, entries, **settings)
    found = torch.autograd.grad(output.loss, case.inputs)
    student = reference.logits(case.hidden, case.weight, case.bias)
    teacher = reference.logits(case.teacher_hidden, case.teacher_weight)
    if kind == "entries":
        log_probs = teacher.log_softmax(-1).gather(-1, entries.clamp(min=0))
        teacher = reference.served_teacher(entries, log_probs, 67)
    token_loss = reference.divergence(
        student,
        teacher,
        divergence=divergence,
        support=reference_support(kind, student, teacher, entries),
        remainder=remainder,
        entry_clip=entry_clip,
        **floor,
        **SETTINGS.get(divergence, {}),
    )
    expected = torch.autograd.grad((token_loss * case.token_weights).sum(), case.inputs)
    alive = case.token_weights != 0
    assert_close(output.token_loss[alive], token_loss[alive], torch.float64, "token_loss")
    assert (output.token_loss[~alive] == 0).all()
    for name, value, exact in zip(("hidden", "weight", "bias"), found, expected, strict=True):
        assert_close(value, exact, torch.float64, name)


def test_every_refusal_of_the_table_is_met():
    rows = [
        dict(zip(NAMES, row, strict=True))
        for row in itertools.product(
            combinations.DIVERGENCES,
            combinations.SUPPORTS,
            combinations.REMAINDERS,
            *[(False, True)] * 3,
        )
    ]
    met = {entry.reason for entry in map(combinations.refusal, rows) if entry}
    assert len(met) == len(combinations.REFUSALS)
