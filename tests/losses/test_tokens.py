"""The token path against the reference: log-probabilities, cross entropy, policies, evidence."""

import pytest
import torch
from cases import make_case
from closeness import assert_close

import fused_sd
from fused_sd import reference, rlcsd_loss


def logits_of(case, temperature=1.0):
    return reference.logits(
        case.hidden,
        case.weight,
        case.bias,
        softcap=case.softcap,
        logit_scale=case.logit_scale,
        temperature=temperature,
    )


def assert_same_gradients(loss, exact, case, dtype=torch.float64):
    found = torch.autograd.grad(loss, case.inputs, retain_graph=True)
    expected = torch.autograd.grad(exact, case.inputs, retain_graph=True)
    for value, truth in zip(found, expected, strict=True):
        assert_close(value, truth, dtype)


@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize("softcap", [None, 4.0])
def test_token_log_probs_and_entropy_are_differentiable(entropy, softcap):
    case = make_case(bias=True, softcap=softcap, logit_scale=0.7)
    found = fused_sd.token_log_probs(
        case.hidden, case.head, case.token_ids, temperature=0.7, entropy=entropy, chunk_size=3
    )
    logits = logits_of(case, 0.7)
    exact = reference.token_log_prob(logits, case.token_ids)
    assert_close(found.log_probs, exact, torch.float64)
    row_weights = torch.randn(2, 7, dtype=torch.float64)
    loss, truth = (found.log_probs * row_weights[0]).sum(), (exact * row_weights[0]).sum()
    if entropy:
        assert_close(found.entropy, reference.entropy(logits), torch.float64)
        loss = loss + (found.entropy * row_weights[1]).sum()
        truth = truth + (reference.entropy(logits) * row_weights[1]).sum()
    else:
        assert found.entropy is None
    assert_same_gradients(loss, truth, case)


def test_token_log_probs_leave_out_tokens_without_weight():
    case = make_case()
    ids = torch.where(case.token_weights == 0, -100, case.token_ids)
    with torch.no_grad():
        case.hidden[case.token_weights == 0] = torch.nan
    found = fused_sd.token_log_probs(case.hidden, case.head, ids, token_weights=case.token_weights)
    assert (found.log_probs[case.token_weights == 0] == 0).all()
    (gradient,) = torch.autograd.grad(found.log_probs.sum(), (case.hidden,))
    assert gradient.isfinite().all()
    assert (gradient[case.token_weights == 0] == 0).all()


@pytest.mark.parametrize("tail", [False, True])
@pytest.mark.parametrize("given", [False, True])
def test_entry_log_probs_and_tail_are_differentiable(tail, given):
    case = make_case(bias=True, vocab=1009, softcap=9.0)
    entries = torch.stack([torch.randperm(1009)[:3] for _ in range(7)]) if given else 3
    found = fused_sd.entry_log_probs(
        case.hidden, case.head, entries, tail=tail, temperature=0.8, chunk_size=2
    )
    logits = logits_of(case, 0.8)
    ids = entries if given else logits.topk(3).indices
    assert torch.equal(found.token_ids, ids)
    exact = reference.log_probs(logits).gather(-1, ids)
    assert_close(found.log_probs, exact, torch.float64)
    row_weights = torch.randn(7, 4, dtype=torch.float64)
    loss, truth = (found.log_probs * row_weights[:, :3]).sum(), (exact * row_weights[:, :3]).sum()
    if tail:
        mask = reference.given_ids(ids, 1009)
        rest = reference.log_mass(reference.log_probs(logits).masked_fill(mask, -torch.inf))
        assert_close(found.tail, rest[:, 0], torch.float64)
        loss = loss + (found.tail * row_weights[:, 3]).sum()
        truth = truth + (rest[:, 0] * row_weights[:, 3]).sum()
    assert_same_gradients(loss, truth, case)


def test_entry_log_probs_of_the_whole_vocabulary():
    case = make_case(vocab=11)
    found = fused_sd.entry_log_probs(case.hidden, case.head, 11, tail=True)
    assert (found.tail == -torch.inf).all()
    assert_close(found.log_probs.exp().sum(-1), torch.ones(7).double(), torch.float64)


@pytest.mark.parametrize("reduction", ["sum", "mean", "none"])
def test_cross_entropy_ignores_what_has_no_weight(reduction):
    case = make_case(bias=True)
    ids = case.token_ids.clone()
    ids[2] = -100
    weights = torch.where(ids == -100, 0, case.token_weights)
    output = fused_sd.cross_entropy_loss(
        case.hidden,
        case.head,
        ids,
        token_weights=case.token_weights,
        reduction=reduction,
        chunk_size=2,
        metrics=("student_log_prob", "student_entropy"),
    )
    exact = reference.cross_entropy(logits_of(case), ids.clamp(min=0)) * weights
    scale = weights.sum() if reduction == "mean" else 1
    assert_close(output.loss.sum(), exact.sum() / scale, torch.float64)
    assert_same_gradients(output.loss.sum(), exact.sum() / scale, case)
    entropy = reference.entropy(logits_of(case))
    assert_close(
        output.metrics["student_entropy"], torch.where(weights != 0, entropy, 0), torch.float64
    )
    plain = fused_sd.cross_entropy_loss(case.hidden, case.head, ids, reduction="mean")
    torch_loss = torch.nn.functional.cross_entropy(logits_of(case), ids)
    assert_close(plain.loss, torch_loss, torch.float64)


ADVANTAGES = torch.tensor([1.0, -1.0, 0.0, 2.0, -0.5, 1.5, -2.0], dtype=torch.float64)


def policy_inputs():
    case = make_case(bias=True)
    log_prob = reference.token_log_prob(logits_of(case), case.token_ids).detach()
    teacher = reference.logits(case.teacher_hidden, case.teacher_weight)
    b = reference.token_log_prob(teacher, case.token_ids).detach()
    # ratios inside the clip, outside it on both sides, and far out
    old = log_prob + torch.tensor([0.05, -0.6, 0.0, -1.0, 0.7, 0.9, -2.5], dtype=torch.float64)
    return case, b, old


@pytest.mark.parametrize("old_given", [True, False])
@pytest.mark.parametrize("ratio_clip", [(0.2, 0.28), None])
@pytest.mark.parametrize("dual_clip", [None, 3.0])
@pytest.mark.parametrize("kl", [0.0, 0.3])
def test_policy_loss_equals_the_reference(old_given, ratio_clip, dual_clip, kl):
    case, b, old = policy_inputs()
    old = old if old_given else None
    settings = {"ratio_clip": ratio_clip, "dual_clip": dual_clip, "kl_coefficient": kl}
    output = fused_sd.policy_loss(
        case.hidden,
        case.head,
        case.token_ids,
        ADVANTAGES,
        old_log_probs=old,
        reference_log_probs=b if kl else None,
        token_weights=case.token_weights,
        chunk_size=3,
        reduction="sum",
        **settings,
    )
    log_prob = reference.token_log_prob(logits_of(case), case.token_ids)
    exact = reference.policy(
        log_prob, ADVANTAGES, old, reference_log_prob=b if kl else None, **settings
    )
    exact = (exact * case.token_weights).sum()
    assert_close(output.loss, exact, torch.float64)
    assert_same_gradients(output.loss, exact, case)


@pytest.mark.parametrize("teacher_kind", ["states", "log_probs"])
@pytest.mark.parametrize("log_prob_kind", ["current", "old"])
@pytest.mark.parametrize("mix", [0.0, 0.3, 1.0])
def test_rlsd_equals_the_reference(teacher_kind, log_prob_kind, mix):
    case, b, old = policy_inputs()
    evidence = fused_sd.Evidence(clip=(0.2, 0.3), mix=mix, log_prob=log_prob_kind)
    teacher_head = case.teacher_weight.detach()
    if teacher_kind == "states":
        given = {"teacher_hidden": case.teacher_hidden, "teacher_head": teacher_head}
    else:
        given = {"teacher_log_probs": b}
    output = fused_sd.rlsd_loss(
        case.hidden,
        case.head,
        case.token_ids,
        ADVANTAGES,
        old_log_probs=old,
        evidence=evidence,
        reduction="sum",
        metrics=("evidence", "evidence_weight", "importance_ratio", "teacher_log_prob"),
        **given,
    )
    log_prob = reference.token_log_prob(logits_of(case), case.token_ids)
    exact = reference.rlsd(
        log_prob,
        b,
        ADVANTAGES,
        old,
        mix=mix,
        evidence_clip=(0.2, 0.3),
        evidence_log_prob=old if log_prob_kind == "old" else None,
    ).sum()
    assert_close(output.loss, exact, torch.float64)
    assert_same_gradients(output.loss, exact, case)
    base = old if log_prob_kind == "old" else log_prob.detach()
    assert_close(output.metrics["evidence"], b - base, torch.float64)
    assert_close(output.metrics["teacher_log_prob"], b, torch.float64)
    weight = torch.exp(ADVANTAGES.sign() * (b - base)).clamp(0.8, 1.3)
    assert_close(output.metrics["evidence_weight"], weight, torch.float64)


def test_rlsd_by_hand():
    """Two tokens of uniform distributions over 4: the teacher thinks twice as much of the first."""
    hidden = torch.zeros(2, 3, dtype=torch.float64, requires_grad=True)
    head = torch.randn(4, 3, dtype=torch.float64)
    b = torch.log(torch.tensor([0.5, 0.25], dtype=torch.float64))
    output = fused_sd.rlsd_loss(
        hidden,
        head,
        torch.tensor([0, 1]),
        torch.tensor([1.0, -1.0]),
        teacher_log_probs=b,
        evidence=fused_sd.Evidence(clip=(0.5, 0.5), mix=0.5),
        reduction="none",
        metrics=("evidence_weight",),
    )
    assert_close(
        output.metrics["evidence_weight"], torch.tensor([1.5, 1.0]).double(), torch.float64
    )
    assert_close(output.loss, torch.tensor([-1.25, 1.0]).double(), torch.float64)


@pytest.mark.parametrize("reduction", ["sum", "mean", "none"])
@pytest.mark.parametrize("weighted", [False, True])
def test_tokens_without_an_advantage_are_left_out(reduction, weighted):
    """Whatever they hold: they contribute 0 to the loss, and to a mean their weight."""
    case = make_case()
    advantages = torch.randn(7, dtype=torch.float64)
    advantages[:5] = 0
    weights = case.token_weights if weighted else None
    settings = {"token_weights": weights, "reduction": reduction}
    call = (case.head, case.token_ids, advantages)
    exact = fused_sd.policy_loss(case.hidden, *call, metrics=("importance_ratio",), **settings)
    assert (exact.metrics["importance_ratio"][:5] != 0).any()  # metrics are of all tokens
    with torch.no_grad():
        spoiled = case.hidden.clone()
        spoiled[:5] = torch.nan
    spoiled.requires_grad_(True)
    loss = fused_sd.policy_loss(spoiled, *call, **settings).loss
    assert_close(loss, exact.loss, torch.float64)
    gradient = torch.autograd.grad(loss.sum(), spoiled)[0]
    assert_close(gradient, torch.autograd.grad(exact.loss.sum(), case.hidden)[0], torch.float64)


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
@pytest.mark.parametrize("capped", [False, True])
def test_sampled_kl_equals_the_reference(estimator, capped):
    case, b, old = policy_inputs()
    importance = fused_sd.ImportanceCap(old, 1.5) if capped else None
    states = {"teacher_hidden": case.teacher_hidden}
    states["teacher_head"] = case.teacher_weight.detach()
    outputs = [
        fused_sd.sampled_kl_loss(
            case.hidden,
            case.head,
            case.token_ids,
            estimator=estimator,
            importance=importance,
            token_weights=case.token_weights,
            reduction="sum",
            **given,
        )
        for given in (states, {"teacher_log_probs": b})
    ]
    log_prob = reference.token_log_prob(logits_of(case), case.token_ids)
    exact = getattr(reference, f"sampled_{estimator}")(log_prob, b)
    if capped:
        exact = exact * reference.importance(log_prob, old, 1.5)
    exact = (exact * case.token_weights).sum()
    for output in outputs:
        assert_close(output.loss, exact, torch.float64)
        assert_same_gradients(output.loss, exact, case)


def test_rlcsd_equals_the_reference():
    case, b, old = policy_inputs()
    wrong = b[:, None] + 0.05 * torch.randn(7, 3, dtype=torch.float64)
    wrong_mask = torch.ones(7, 3, dtype=torch.bool)
    wrong_mask[1, 1:] = False
    wrong_mask[2] = False
    mask = torch.tensor([1, 1, 1, 0, 1, 1, 1], dtype=torch.float64)
    output = rlcsd_loss(
        case.hidden,
        case.head,
        case.token_ids,
        ADVANTAGES,
        b,
        wrong,
        wrong_mask=wrong_mask,
        token_weights=mask,
        old_log_probs=old,
        selected_weight=0.7,
    )
    log_prob = reference.token_log_prob(logits_of(case), case.token_ids)
    absent = wrong.masked_fill(~wrong_mask, -torch.inf)
    token_loss = reference.rlcsd(log_prob, ADVANTAGES, b, absent, old)
    _, selected = reference.rlcsd_advantages(ADVANTAGES, b, absent)
    exact = reference.rlcsd_mean(token_loss[None], mask[None], selected[None], eta=0.7)
    assert_close(output.loss, exact, torch.float64)
    assert_same_gradients(output.loss, exact, case)


def test_a_policy_gradient_that_overflows_is_clamped():
    case, _, _ = policy_inputs()
    old = torch.full((7,), -500.0, dtype=torch.float64)
    output = fused_sd.policy_loss(
        case.hidden,
        case.head,
        case.token_ids,
        ADVANTAGES,
        old_log_probs=old,
        ratio_clip=None,
        reduction="sum",
    )
    gradients = torch.autograd.grad(output.loss, case.inputs)
    assert output.loss.isfinite()
    assert all((gradient == 0).all() for gradient in gradients)


def test_the_evidence_schedule_warms_up_holds_and_decays():
    schedule = fused_sd.EvidenceSchedule(
        0.5, warmup_steps=2, hold_steps=3, decay_steps=5, first_step=0
    )
    values = []
    for _ in range(12):
        values.append(schedule.value)
        schedule.step()
    expected = [0.0, 0.25, 0.5, 0.5, 0.5, 0.5, 0.4, 0.3, 0.2, 0.1, 0.0, 0.0]
    assert values == pytest.approx(expected)
    other = fused_sd.EvidenceSchedule(
        0.5, warmup_steps=2, hold_steps=3, decay_steps=5, first_step=0
    )
    other.load_state_dict({"num_steps": 6})
    assert other.value == pytest.approx(0.4)
    assert fused_sd.EvidenceSchedule(0.3).value == 0.3
