"""Old names of arguments and metrics: they give what the new ones give, with a warning."""

import pytest
import torch
from cases import make_case

import fused_sd


def policy(case, **settings):
    advantages = torch.linspace(-1, 1, 7, dtype=torch.float64)
    given = case.hidden, case.head, case.token_ids, advantages
    return fused_sd.policy_loss(
        *given, old_log_probs=case.old_log_probs, reduction="sum", **settings
    )


@pytest.mark.parametrize(
    "old, new",
    [
        ("log_prob", "student_log_prob"),
        ("entropy", "student_entropy"),
        ("ratio", "importance_ratio"),
    ],
)
def test_an_old_metric_is_the_new_one_under_the_name_that_was_asked_for(old, new):
    case = make_case()
    with pytest.warns(DeprecationWarning, match=f"'{old}' is now called '{new}'"):
        found = policy(case, metrics=(old,)).metrics
    assert list(found) == [old]
    assert torch.equal(found[old], policy(case, metrics=(new,)).metrics[new])


def test_old_names_of_values_with_a_gradient():
    case = make_case()
    sides = case.hidden, case.head, case.teacher_hidden, case.teacher_head
    run = {"token_ids": case.token_ids, "reduction": "none"}
    with pytest.warns(DeprecationWarning, match="student_entropy"):
        found = fused_sd.divergence_loss(*sides, with_grad=("entropy",), **run).with_grad
    exact = fused_sd.divergence_loss(*sides, with_grad=("student_entropy",), **run).with_grad
    assert list(found) == ["entropy"]
    assert torch.equal(found["entropy"], exact["student_entropy"])
    assert found["entropy"].requires_grad


@pytest.mark.parametrize("loss", [fused_sd.rlsd_loss, fused_sd.policy_loss])
def test_a_teacher_as_a_pair(loss):
    case = make_case()
    advantages = torch.linspace(-1, 1, 7, dtype=torch.float64)
    given = case.hidden, case.head, case.token_ids, advantages
    teacher = case.teacher_hidden, case.teacher_weight.detach()
    evidence = {"evidence": fused_sd.Evidence(), "reduction": "sum"}
    with pytest.warns(DeprecationWarning, match="teacher_hidden=hidden, teacher_head=head"):
        found = loss(*given, teacher=teacher, **evidence).loss
    states = dict(zip(("teacher_hidden", "teacher_head"), teacher, strict=True))
    assert torch.equal(found, loss(*given, **states, **evidence).loss)
    with (
        pytest.warns(DeprecationWarning, match="teacher_hidden"),
        pytest.raises(ValueError, match="teacher must be given once"),
    ):
        loss(*given, teacher=teacher, **states, **evidence)


def test_half_a_teacher_is_refused():
    case = make_case()
    with pytest.raises(ValueError, match="teacher_head must come with the other one"):
        policy(case, teacher_hidden=case.teacher_hidden, evidence=fused_sd.Evidence())


def test_an_option_that_no_loss_has_is_refused():
    case = make_case()
    with pytest.raises(TypeError, match=r"unknown keyword 'temprature': .* temperature"):
        policy(case, temprature=0.5)
    with pytest.raises(TypeError, match="unknown keyword 'topk'"):
        fused_sd.gkd_loss(case.hidden, case.head, case.teacher_hidden, case.teacher_head, topk=8)
    with pytest.raises(TypeError, match="reduction"):
        fused_sd.token_log_probs(case.hidden, case.head, case.token_ids, reduction="mean")


def test_a_teachers_temperature_needs_a_teachers_logits():
    case = make_case()
    with pytest.raises(ValueError, match="teacher_temperature must be left out"):
        policy(case, teacher_temperature=0.5)
    ids = torch.zeros(7, 2, dtype=torch.int64)
    with pytest.raises(ValueError, match="teacher_temperature must be left out"):
        fused_sd.topk_divergence_loss(
            case.hidden, case.head, ids, -torch.ones(7, 2), teacher_temperature=0.5, reduction="sum"
        )


def test_the_warning_points_at_the_callers_line():
    """Python shows a deprecation only where it points at code outside the library."""
    case = make_case()
    with pytest.warns(DeprecationWarning, match="importance_ratio") as caught:
        policy(case, metrics=("ratio",))
    assert caught[0].filename == __file__
