"""Every named loss, as function and as module, with its presets against the reference."""

import pytest
import torch
from cases import make_case
from closeness import assert_close

import fused_sd
from fused_sd import reference

K = 5
DIVERGENCES = {
    "sdpo": ({"top_k": K}, lambda s, t: reference.sdpo(s, t, k=K)),
    "sdpo_floor": (
        {"top_k": K, "tail_floor": 1e-7},
        lambda s, t: reference.sdpo(s, t, k=K, tail_floor=1e-7),
    ),
    "sdpo_feedback": (
        {"alpha": 1.0, "top_k": K},
        lambda s, t: reference.sdpo(s, t, alpha=1.0, k=K),
    ),
    "sdpo_full": ({"alpha": 1.0, "top_k": None}, reference.sd_zero_paper),
    "sd_zero": ({"top_k": K}, lambda s, t: reference.sd_zero(s, t, k=K)),
    "sd_zero_paper": ({"variant": "paper"}, reference.sd_zero_paper),
    "opsd": ({}, reference.opsd),
    "opsd_topk": (
        {"top_k": K, "remainder": "tail"},
        lambda s, t: reference.opsd_topk(s, t, k=K),
    ),
    "sdft": ({}, reference.sdft),
    "sdft_trl": (
        {"alpha": 0.5, "top_k": K},
        lambda s, t: reference.sdft_trl(s, t, k=K),
    ),
    "gkd": ({"temperature": 0.9}, reference.gkd),
    "gkd_end": ({"beta": 0.0}, lambda s, t: reference.gkd(s, t, beta=0.0)),
}
MODULES = {
    "sdpo": fused_sd.SDPOLoss,
    "sd": fused_sd.SDZeroLoss,
    "opsd": fused_sd.OPSDLoss,
    "sdft": fused_sd.SDFTLoss,
    "gkd": fused_sd.GKDLoss,
}


@pytest.mark.parametrize("name", DIVERGENCES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_divergence_presets_equal_the_papers(name, dtype):
    settings, exact_loss = DIVERGENCES[name]
    case = make_case(dtype=dtype)
    double = case.to(torch.float64)
    sides = case.hidden, case.head, case.teacher_hidden, case.teacher_head
    base = name if name.startswith("sd_zero") else name.split("_")[0]
    function = getattr(fused_sd, f"{base.removesuffix('_paper')}_loss")
    output = function(*sides, token_weights=case.token_weights, **settings)
    module = MODULES[name.split("_")[0]](**settings)
    twin = module(*sides, token_weights=case.token_weights)
    assert torch.equal(twin.loss, output.loss)
    temperature = settings.get("temperature", 1.0)
    student = reference.logits(double.hidden, double.weight, temperature=temperature)
    teacher = reference.logits(
        double.teacher_hidden, double.teacher_weight, temperature=temperature
    )
    weights = double.token_weights
    exact = (exact_loss(student, teacher) * weights).sum() / weights.sum()
    assert_close(output.loss, exact, dtype)
    found = torch.autograd.grad(output.loss, case.inputs)
    for value, truth in zip(found, torch.autograd.grad(exact, double.inputs), strict=True):
        assert_close(value, truth, dtype)


def test_sdpo_multiplies_by_the_capped_importance_ratio():
    case = make_case()
    output = fused_sd.sdpo_loss(
        case.hidden,
        case.head,
        case.teacher_hidden,
        case.teacher_head,
        top_k=K,
        token_ids=case.token_ids,
        old_log_probs=case.old_log_probs,
        reduction="sum",
    )
    student = reference.logits(case.hidden, case.weight)
    teacher = reference.logits(case.teacher_hidden, case.teacher_weight)
    exact = reference.sdpo(student, teacher, case.token_ids, case.old_log_probs, k=K).sum()
    assert_close(output.loss, exact, torch.float64)


def test_defaults_are_the_official_settings():
    large = make_case(vocab=1009)
    sides = large.hidden, large.head, large.teacher_hidden, large.teacher_head
    student = reference.logits(large.hidden, large.weight)
    teacher = reference.logits(large.teacher_hidden, large.teacher_weight)
    for loss, exact in (
        (fused_sd.sdpo_loss, reference.sdpo(student, teacher)),
        (fused_sd.sd_zero_loss, reference.sd_zero(student, teacher)),
        (fused_sd.opsd_loss, reference.opsd(student, teacher)),
        (fused_sd.sdft_loss, reference.sdft(student, teacher)),
        (fused_sd.gkd_loss, reference.gkd(student, teacher)),
    ):
        assert_close(loss(*sides).loss, exact.mean(), torch.float64)


def test_policies_as_modules_equal_their_functions():
    case = make_case()
    advantages = torch.randn(7)
    tokens = case.hidden, case.head, case.token_ids, advantages
    b = case.old_log_probs
    pairs = [
        (fused_sd.GRPOLoss(ratio_clip=(0.1, 0.3)), fused_sd.grpo_loss, {"ratio_clip": (0.1, 0.3)}),
        (fused_sd.RLSDLoss(dual_clip=None), fused_sd.rlsd_loss, {"dual_clip": None}),
    ]
    for module, function, settings in pairs:
        given = {"old_log_probs": b}
        if function is fused_sd.rlsd_loss:
            given["teacher_log_probs"] = b
        one, other = module(*tokens, **given), function(*tokens, **settings, **given)
        assert torch.equal(one.loss, other.loss)
    wrong = b[:, None].expand(7, 2)
    one = fused_sd.RLCSDLoss()(*tokens, b, wrong)
    assert torch.equal(one.loss, fused_sd.rlcsd_loss(*tokens, b, wrong).loss)
    one = fused_sd.CrossEntropyLoss(reduction="mean")(*tokens[:3])
    assert torch.equal(one.loss, fused_sd.cross_entropy_loss(*tokens[:3], reduction="mean").loss)


def test_a_module_shows_its_settings_and_a_call_goes_over_them():
    module = fused_sd.SDPOLoss(alpha=1.0, top_k=20)
    assert repr(module) == "SDPOLoss(alpha=1.0, top_k=20)"
    case = make_case()
    sides = case.hidden, case.head, case.teacher_hidden, case.teacher_head
    other = fused_sd.sdpo_loss(*sides, alpha=1.0, top_k=3)
    assert torch.equal(module(*sides, top_k=3).loss, other.loss)
    with pytest.raises(ValueError, match=r"SDPOLoss must be one of .*'alpha'.*got 'beta'"):
        fused_sd.SDPOLoss(beta=1.0)


def test_a_servers_teacher_gives_the_same_loss_as_its_states():
    case = make_case(vocab=101)
    teacher = reference.logits(case.teacher_hidden, case.teacher_weight).log_softmax(-1)
    log_probs, ids = teacher.topk(K)
    ids = torch.cat([ids, torch.zeros(7, 1, dtype=torch.int64)], -1)  # padding as servers send it
    log_probs = torch.cat([log_probs, torch.full((7, 1), -torch.inf).double()], -1)
    for remainder in ("tail", "renormalize", "drop", "teacher_renormalize"):
        settings = {"divergence": "forward_kl", "remainder": remainder, "reduction": "sum"}
        served = fused_sd.topk_divergence_loss(
            case.hidden, case.head, ids, log_probs, metrics=("teacher_mass",), **settings
        )
        states = fused_sd.divergence_loss(
            case.hidden,
            case.head,
            case.teacher_hidden,
            case.teacher_head,
            support=fused_sd.TeacherTopK(K),
            metrics=("teacher_mass",),
            **settings,
        )
        assert_close(served.loss, states.loss, torch.float64)
        assert_close(served.metrics["teacher_mass"], states.metrics["teacher_mass"], torch.float64)
        one, other = (torch.autograd.grad(x.loss, case.inputs) for x in (served, states))
        for value, truth in zip(one, other, strict=True):
            assert_close(value, truth, torch.float64)
