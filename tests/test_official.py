"""The fused losses against other people's code: TRL's own loss functions, in float64."""

import pytest
import torch
from cases import make_case
from closeness import assert_close

import fused_sd
from fused_sd import reference

pytest.importorskip("trl")
from trl.experimental.sdpo import loss_utils

K = 6


def sides(vocab=211):
    case = make_case(num_tokens=12, vocab=vocab, gap=0.8)
    case.token_weights = torch.ones(12, dtype=torch.float64)
    student = reference.logits(case.hidden, case.weight, temperature=0.9)
    teacher = reference.logits(case.teacher_hidden, case.teacher_weight, temperature=0.9).detach()
    pair = case.hidden, case.head, case.teacher_hidden, case.teacher_head
    return case, student, teacher, pair


def assert_same(case, output, exact):
    assert_close(output.token_loss, exact, torch.float64)
    found = torch.autograd.grad(output.loss, case.inputs)
    for value, truth in zip(found, torch.autograd.grad(exact.sum(), case.inputs), strict=True):
        assert_close(value, truth, torch.float64)


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_trls_full_logit_loss(alpha):
    case, student, teacher, pair = sides()
    exact = loss_utils.compute_full_logit_self_distillation_loss(
        student, teacher, distillation_alpha=alpha
    )
    output = fused_sd.sdpo_loss(*pair, alpha=alpha, top_k=None, temperature=0.9, reduction="sum")
    assert_same(case, output, exact)


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("add_tail", [False, True])
def test_trls_top_k_loss(alpha, add_tail):
    case, student, teacher, pair = sides()
    exact = loss_utils.compute_topk_self_distillation_loss(
        student,
        teacher,
        distillation_topk=K,
        distillation_alpha=alpha,
        distillation_add_tail=add_tail,
    )
    output = fused_sd.sdpo_loss(
        *pair,
        alpha=alpha,
        top_k=K,
        add_tail=add_tail,
        tail_floor=1e-7 if add_tail else None,
        temperature=0.9,
        reduction="sum",
    )
    assert_same(case, output, exact)


def test_trls_sampled_token_loss():
    case, student, teacher, _ = sides()
    exact = loss_utils.compute_sampled_token_self_distillation_loss(
        student, teacher, case.token_ids, distillation_alpha=1.0
    )
    output = fused_sd.sampled_kl_loss(
        case.hidden,
        case.head,
        case.token_ids,
        teacher=(case.teacher_hidden, case.teacher_weight.detach()),
        temperature=0.9,
    )
    assert_same(case, output, exact)


def test_trls_importance_cap():
    case, student, teacher, pair = sides()
    token_loss = loss_utils.compute_full_logit_self_distillation_loss(
        student, teacher, distillation_alpha=0.5
    )
    log_prob = reference.token_log_prob(student, case.token_ids)
    exact = loss_utils.apply_importance_sampling_clipping(
        token_loss, log_prob, case.old_log_probs, 2.0
    )
    output = fused_sd.sdpo_loss(
        *pair,
        top_k=None,
        temperature=0.9,
        token_ids=case.token_ids,
        old_log_probs=case.old_log_probs,
        reduction="none",
    )
    assert_close(output.loss, exact, torch.float64)
    found = torch.autograd.grad(output.loss.sum(), case.inputs)
    for value, truth in zip(found, torch.autograd.grad(exact.sum(), case.inputs), strict=True):
        assert_close(value, truth, torch.float64)
