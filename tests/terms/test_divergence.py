"""The terms: derivatives, twins, precision."""

import pytest
import torch
from cases import make_case
from closeness import assert_close
from divergences import EACH

import fused_sd
from fused_sd import reference
from fused_sd.terms.divergence_term import divergence_term, named_divergence
from fused_sd.torch_kernels import near

DIVERGENCES = {
    **EACH,
    "jsd_low": (fused_sd.Jsd(0.1), {"beta": 0.1}),
    "skew_kl_low": (fused_sd.SkewKl(0.2), {"student_weight": 0.2}),
}
each_divergence = pytest.mark.parametrize("name", DIVERGENCES)


def pair(name):
    divergence, settings = DIVERGENCES[name]
    return divergence_term(divergence), {"divergence": name.removesuffix("_low"), **settings}


@each_divergence
def test_plain_term_is_the_papers(name):
    term, settings = pair(name)
    log_s = (torch.randn(50, dtype=torch.float64) * 3).log_softmax(-1)
    log_t = (torch.randn(50, dtype=torch.float64) * 3).log_softmax(-1)
    value, _ = term.plain(log_s, log_t)
    assert_close(value, reference.terms(log_s, log_t, **settings), torch.float64)


@each_divergence
def test_derivative_is_autograds(name):
    term, settings = pair(name)
    log_s = (torch.randn(50, dtype=torch.float64) * 3).log_softmax(-1).requires_grad_(True)
    log_t = (torch.randn(50, dtype=torch.float64) * 3).log_softmax(-1)
    reference.terms(log_s, log_t, **settings).sum().backward()
    assert_close(term.plain(log_s.detach(), log_t)[1], log_s.grad, torch.float64)


@each_divergence
def test_balanced_terms_are_not_negative_and_sum_to_the_divergence(name):
    term, settings = pair(name)
    for gap in (1e-6, 1e-2, 1.0, 30.0):
        logits = torch.randn(3000, dtype=torch.float64)
        log_s = logits.log_softmax(-1)
        log_t = (logits + gap * torch.randn(3000, dtype=torch.float64)).log_softmax(-1)
        value, _ = term.function(log_s, log_t, term.parameter)
        assert (value >= -1e-17).all()
        exact = reference.terms(log_s, log_t, **settings).sum()
        assert abs(value.sum() - exact) <= 1e-12 + 1e-10 * exact


@each_divergence
@pytest.mark.parametrize("gap, bound", [(1e-4, 0.03), (1e-3, 0.003), (1e-2, 3e-4)])
def test_small_divergences_keep_their_digits_in_fp32(name, gap, bound):
    """KLs of about 5e-9, 5e-7 and 5e-5, where a difference of log-sum-exps is off by far more."""
    term, _ = pair(name)
    logits = torch.randn(50_000) * 4
    teacher = logits + gap * torch.randn(50_000)

    def loss(dtype):
        log_s, log_t = logits.to(dtype).log_softmax(-1), teacher.to(dtype).log_softmax(-1)
        return term.function(log_s, log_t, term.parameter)[0].sum().double()

    exact = loss(torch.float64)
    assert 0 <= abs(loss(torch.float32) - exact) <= bound * exact


@each_divergence
def test_equal_sides_give_exactly_zero(name):
    term, _ = pair(name)
    log_s = (torch.randn(1003) * 5).log_softmax(-1)
    value, dlog_s = term.function(log_s, log_s, term.parameter)
    assert (value == 0).all()
    assert (dlog_s == 0).all()


@each_divergence
def test_missing_entries_have_no_mass(name):
    """An entry of -inf on both sides, and on either alone."""
    term, settings = pair(name)
    logits = torch.tensor([[1.0, 2.0, -torch.inf, 0.5], [0.3, 1.0, -torch.inf, 2.0]]).double()
    log_s, log_t = logits.log_softmax(-1)
    value, dlog_s = term.function(log_s, log_t, term.parameter)
    assert_close(value.sum(), reference.terms(log_s, log_t, **settings).sum(), torch.float64)
    assert dlog_s[2] == 0
    lonely = torch.tensor([1.0, -torch.inf, 0.0, 0.5]).double().log_softmax(-1)
    for s, t in ((log_s, lonely), (lonely, log_s)):
        expected = reference.terms(s, t, **settings).sum()
        value, _ = term.plain(s, t)
        assert_close(value.sum(), expected, torch.float64)


def test_jsd_is_symmetric_when_its_weight_is_swapped():
    log_s, log_t = torch.randn(2, 40, dtype=torch.float64).log_softmax(-1)
    low, high = divergence_term(fused_sd.Jsd(0.2)), divergence_term(fused_sd.Jsd(0.8))
    one = low.function(log_s, log_t, low.parameter)[0].sum()
    other = high.function(log_t, log_s, high.parameter)[0].sum()
    assert_close(one, other, torch.float64)


def test_generalized_jsd_means_the_kls_at_its_ends():
    assert fused_sd.generalized_jsd(0) == fused_sd.generalized_jsd(0.0) == "forward_kl"
    assert fused_sd.generalized_jsd(1) == "reverse_kl"
    assert fused_sd.generalized_jsd(0.25) == fused_sd.Jsd(0.25)


@each_divergence
@pytest.mark.parametrize("entry_clip", [None, 0.02])
def test_without_a_fast_form_the_general_way_gives_the_same(name, entry_clip, monkeypatch):
    """In float32 on a CPU, and in a plan, for a divergence that ``near.py`` does not have."""
    divergence, _ = DIVERGENCES[name]
    case = make_case(dtype=torch.float32)
    sides = case.hidden, case.head, case.teacher_hidden, case.teacher_head
    settings = {"divergence": divergence, "entry_clip": entry_clip, "reduction": "sum"}

    def run():
        output = fused_sd.divergence_loss(*sides, **settings)
        return output.token_loss, *torch.autograd.grad(output.loss, case.inputs)

    fast = run()
    monkeypatch.delitem(near.FORMS, divergence_term(divergence).name)
    for value, other in zip(run(), fast, strict=True):
        assert_close(value, other, torch.float32)
    sizes = {"hidden_size": 64, "vocab": 1000, "tokens": 256, "device": "cpu", "dtype": "fp32"}
    planned = fused_sd.plan(objective="divergence", divergence=divergence, **sizes)
    assert planned.peak_bytes > 0


def test_a_sure_skew_kl_is_finite_where_the_student_misses_the_teachers_mass():
    log_s = torch.tensor([[-torch.inf, 0.0]], dtype=torch.float64)
    log_t = torch.tensor([[0.0, -torch.inf]], dtype=torch.float64)
    term = divergence_term(fused_sd.SkewKl(0.75))
    value, dlog_s = term.function(log_s, log_t, term.parameter)
    assert_close(value.sum(), torch.tensor(0.25).double().log().neg(), torch.float64)
    assert dlog_s.isfinite().all()


def test_a_divergence_by_its_name_has_the_parameter_that_it_needs():
    assert named_divergence("reverse_kl") == "reverse_kl"
    assert named_divergence("jsd", 0.25) == fused_sd.Jsd(0.25)
    assert named_divergence("skew_kl", 1 / 4) == fused_sd.SkewKl(0.25)
    for name, parameter, rule in [
        ("kl", None, "divergence must be one of"),
        ("reverse_kl", 0.5, "divergence 'reverse_kl' must have no parameter, got 0.5"),
        ("jsd", None, r"divergence 'jsd' must have its beta, got none; pass it, as Jsd\(beta\)"),
    ]:
        with pytest.raises(ValueError, match=rule):
            named_divergence(name, parameter)


@each_divergence
def test_a_metric_is_of_all_terms_where_the_loss_clips_them(name):
    """The loss's own sum is the metric of the same name only where no entry is cut."""
    case, (divergence, _) = make_case(), DIVERGENCES[name]
    sides = case.hidden, case.head, case.teacher_hidden, case.teacher_head
    metrics = ("forward_kl", "reverse_kl", "jsd")
    how = {"divergence": divergence, "reduction": "sum", "metrics": metrics}
    whole = fused_sd.divergence_loss(*sides, **how)
    cut = fused_sd.divergence_loss(*sides, entry_clip=1e-3, **how)
    assert cut.loss < whole.loss
    for metric in metrics:
        assert_close(cut.metrics[metric], whole.metrics[metric].double(), torch.float32)
