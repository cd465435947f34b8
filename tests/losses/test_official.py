"""The fused losses against other people's code: TRL's own loss functions, in float64."""

import pytest
import torch
from cases import make_case
from closeness import assert_close
from official_batches import BATCHES
from official_batches import assert_same as assert_same_loss

import fused_sd
from fused_sd import reference

pytest.importorskip("trl")
from trl.experimental.gkd import GKDTrainer
from trl.experimental.iw_opd import IWOPDTrainer
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
        teacher_hidden=case.teacher_hidden,
        teacher_head=case.teacher_weight.detach(),
        temperature=0.9,
        reduction="sum",
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


def labels(batch):
    return batch.token_ids.masked_fill(batch.mask == 0, -100)


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("kind", BATCHES)
def test_trls_gkd_loss(beta, kind):
    batch = BATCHES[kind]()
    exact = GKDTrainer.generalized_jsd_loss(
        batch.student_logits(), batch.teacher_logits(), labels(batch), beta, temperature=0.9
    )
    output = fused_sd.gkd_loss(*batch.sides, beta=beta, token_weights=batch.mask, temperature=0.9)
    assert_same_loss(output.loss, exact, batch, batch)


IW_OPD_SUPPORTS = {
    0.0: fused_sd.TeacherTopK(K),
    0.3: fused_sd.UnionTopK(K),
    1.0: fused_sd.StudentTopK(K),
}


@pytest.mark.parametrize("add_tail", [False, True])
@pytest.mark.parametrize("beta", IW_OPD_SUPPORTS)
@pytest.mark.parametrize("kind", BATCHES)
def test_trls_iw_opd_divergence(beta, add_tail, kind):
    batch = BATCHES[kind]()
    exact = IWOPDTrainer.generalized_jsd_loss(
        batch.student_logits(),
        batch.teacher_logits(),
        labels(batch),
        beta,
        top_k=K,
        add_tail=add_tail,
    )
    output = fused_sd.divergence_loss(
        *batch.sides,
        divergence=fused_sd.generalized_jsd(beta),
        support=IW_OPD_SUPPORTS[beta],
        remainder="tail" if add_tail else "renormalize",
        tail_floor=1e-7 if add_tail else None,
        token_weights=batch.mask,
        reduction="mean",
    )
    assert_same_loss(output.loss, exact, batch, batch)
