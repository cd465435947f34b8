"""Teachers of which a server sent few log-probabilities, rounded: sure, empty and wrong ones.

The truth is float64 arithmetic on the numbers as they were sent.
"""

import pytest
import torch
from closeness import TOLERANCE

pytest.importorskip("hypothesis")
from hypothesis import given, settings
from hypothesis import strategies as st

import fused_sd
from fused_sd import checks, reference
from fused_sd.terms.buckets import served_tail

VOCAB = 37
DIVERGENCES = {
    "forward_kl": "forward_kl",
    "reverse_kl": "reverse_kl",
    "jsd": fused_sd.Jsd(0.5),
    "mixed_kl": fused_sd.MixedKl(0.5),
    "skew_kl": fused_sd.SkewKl(0.9),
}
SENT = (torch.float32, torch.bfloat16, torch.float16)
FORMS = [(r, g) for r in ("sum", "none") for g in ("dense", "sparse", "auto")]


def student(num_tokens, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = (num_tokens, 6), (VOCAB, 6)
    hidden, head = (torch.randn(*s, generator=generator).to(dtype) for s in shapes)
    return hidden.requires_grad_(), head


def loss_and_gradient(side, ids, log_probs, **choices):
    output = fused_sd.topk_divergence_loss(*side, ids, log_probs, **{"reduction": "sum", **choices})
    output.loss.sum().backward()
    return output.token_loss, side[0].grad


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 2**31),
    st.sampled_from(SENT),
    st.sampled_from([1.0, 5.0, 20.0, 60.0, 200.0]),
    st.integers(1, VOCAB),
    st.sampled_from(list(DIVERGENCES)),
)
def test_a_peaked_teacher_has_a_finite_loss_and_its_own_tail(seed, sent, scale, k, name):
    logits = scale * torch.randn(8, VOCAB, generator=torch.Generator().manual_seed(seed))
    log_probs, ids = logits.log_softmax(-1).to(sent).topk(k)
    hidden, head = student(8, seed=seed)
    chosen = {"divergence": DIVERGENCES[name], "reduction": "sum"}
    loss, gradient = loss_and_gradient((hidden, head), ids, log_probs, **chosen)
    assert loss.isfinite().all()
    assert (loss >= 0).all()
    assert gradient.isfinite().all()
    # the tail of the numbers as sent, where it is larger than their rounding
    exact = log_probs.double().exp()
    tail = 1 - exact.sum(-1)
    rounding = (exact * (1 - log_probs.double().clamp(min=-700))).sum(-1) * torch.finfo(sent).eps
    is_known = (tail > rounding + 1e-6) & (k < VOCAB)
    others = (VOCAB - k) * torch.ones(8, VOCAB)
    teacher = (tail.clamp(min=1e-300)[:, None] / others).log()
    teacher = teacher.scatter(-1, ids, log_probs.double())
    states = hidden.detach().clone().requires_grad_()
    support = reference.given_ids(ids, VOCAB)
    want = reference.divergence(states @ head.T, teacher, divergence=name, support=support)
    want[is_known].sum().backward()
    torch.testing.assert_close(loss[is_known], want[is_known].detach(), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(gradient[is_known], states.grad[is_known], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("sent", [*SENT, torch.float64], ids=str)
@pytest.mark.parametrize("name", DIVERGENCES)
@pytest.mark.parametrize(
    "log_probs", [[0.0, -30.0], [0.0, -torch.inf], [-0.5, -0.5], [1e-4, -20.0]]
)
def test_a_teacher_whose_mass_is_1_or_more_is_that_of_the_reference(log_probs, name, sent):
    ids = torch.tensor([[3, 5], [1, 0]])
    log_probs = torch.tensor([log_probs, [-0.5, -1.5]], dtype=torch.float64).to(sent)
    teacher = reference.served_teacher(ids, log_probs, VOCAB)
    hidden, head = student(2)
    support = reference.given_ids(ids.masked_fill(log_probs == -torch.inf, -1), VOCAB)
    want = reference.divergence(hidden @ head.T, teacher, divergence=name, support=support)
    want.sum().backward()
    choices = {"divergence": DIVERGENCES[name]}
    loss, gradient = loss_and_gradient(student(2), ids, log_probs, **choices)
    torch.testing.assert_close(loss, want.detach(), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(gradient, hidden.grad, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("reduction", "gradient"), FORMS)
@pytest.mark.parametrize("name", DIVERGENCES)
def test_a_sure_teacher_has_finite_gradients_of_every_form(name, reduction, gradient):
    ids = torch.tensor([[3, 5], [1, 0], [2, 4]])
    log_probs = torch.tensor([[0.0, -30.0], [-0.5, -1.5], [0.0, -torch.inf]])
    choices = {"divergence": DIVERGENCES[name], "reduction": reduction, "gradient": gradient}
    hidden, head = student(3, torch.float32)
    head.requires_grad_()
    loss, dhidden = loss_and_gradient((hidden, head), ids, log_probs, **choices)
    exact = loss_and_gradient(student(3), ids, log_probs, divergence=DIVERGENCES[name])
    torch.testing.assert_close(loss, exact[0].float(), rtol=1e-5, atol=1e-6)
    slack = 1e-4 if gradient == "dense" else 2**-6  # a log-ratio of 16 cancels
    assert (dhidden - exact[1]).norm() <= slack * exact[1].norm()
    assert head.grad.isfinite().all()


def test_a_server_that_sends_the_whole_vocabulary_leaves_no_tail():
    logits = torch.randn(64, VOCAB, generator=torch.Generator().manual_seed(0))
    for sent in SENT:
        log_probs, ids = logits.log_softmax(-1).to(sent).topk(VOCAB)
        loss, gradient = loss_and_gradient(student(64, torch.float32), ids, log_probs)
        assert loss.isfinite().all()
        assert gradient.isfinite().all()


def test_a_tail_below_the_rounding_of_what_was_sent_is_as_large_as_it():
    def tail(numbers, dtype, has_others=True):
        given = torch.tensor([numbers], dtype=torch.float64).to(dtype)
        return served_tail(given, torch.tensor([has_others])).exp().item()

    assert tail([0.0, -30.0], torch.float32) == pytest.approx(2**-23)
    assert tail([0.0], torch.bfloat16) == pytest.approx(2**-23)  # its softmax was in fp32
    assert tail([0.0], torch.float64) == pytest.approx(2**-52)
    two = [float(torch.tensor(0.5).log())] * 2  # in bf16 their sum is 0.9993
    assert tail(two, torch.bfloat16) == pytest.approx(0.0054, rel=0.01)
    assert tail([-1e-5], torch.bfloat16) == pytest.approx(1e-5, rel=0.01)  # one number tells it
    assert tail([0.0], torch.float32, has_others=False) == 0
    assert tail([-0.1], torch.float32, has_others=False) == pytest.approx(0.0952, rel=1e-3)
    assert tail([-torch.inf], torch.float32) == 1


def test_a_tail_floor_is_that_of_the_caller():
    ids, log_probs = torch.tensor([[3, 5]]), torch.tensor([[0.0, -30.0]])
    loss, _ = loss_and_gradient(
        student(1), ids, log_probs, divergence="reverse_kl", tail_floor=1e-3
    )
    hidden, head = student(1)
    teacher = reference.served_teacher(ids, log_probs, VOCAB)
    support = reference.given_ids(ids, VOCAB)
    want = reference.divergence(hidden @ head.T, teacher, support=support, tail_floor=1e-3)
    torch.testing.assert_close(loss, want.detach(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("reduction", "gradient"), FORMS)
@pytest.mark.parametrize("empty", ["ids", "log_probs"])
@pytest.mark.parametrize("remainder", ["tail", "renormalize", "drop", "teacher_renormalize"])
def test_a_token_of_which_nothing_was_sent_has_no_loss(remainder, empty, reduction, gradient):
    ids = torch.tensor([[3, 5], [1, 0]])
    log_probs = torch.tensor([[-0.5, -1.5], [-0.5, -1.5]])
    if empty == "ids":
        ids[1] = -1
    else:
        log_probs[1] = -torch.inf
    names = ("student_mass", "teacher_mass", "student_tail_mass", "teacher_tail_mass")
    for name in ["forward_kl"] if remainder == "teacher_renormalize" else DIVERGENCES:
        clip = {} if remainder == "teacher_renormalize" else {"entry_clip": 0.05}
        metrics = (*names, "entry_clip_fraction") if clip else names
        choices = {"remainder": remainder, "reduction": reduction, "gradient": gradient, **clip}
        choices |= {"divergence": DIVERGENCES[name]}
        hidden, head = student(2, torch.float32)
        output = fused_sd.topk_divergence_loss(
            hidden, head.requires_grad_(), ids, log_probs, metrics=metrics, **choices
        )
        output.loss.sum().backward()
        slack = TOLERANCE[torch.float32]
        assert output.token_loss[1].abs() <= slack
        assert (hidden.grad[1].abs() <= slack).all()
        assert head.grad.isfinite().all()
        for name, values in output.metrics.items():
            assert values.isfinite().all(), name


def test_padding_may_repeat_the_id_of_an_entry():
    ids, log_probs = torch.tensor([[7, 7, 5]]), torch.tensor([[-torch.inf, -1.0, -2.0]])
    with_padding = loss_and_gradient(student(1), ids, log_probs)
    without = loss_and_gradient(student(1), ids[:, 1:], log_probs[:, 1:])
    torch.testing.assert_close(with_padding, without)


@pytest.mark.parametrize("wrong", [torch.nan, torch.inf, 0.5])
def test_what_is_no_log_probability_is_refused_where_values_are_read(wrong):
    ids, log_probs = torch.tensor([[3, 5], [1, 0]]), torch.tensor([[-0.5, -1.5], [wrong, -1.5]])
    with pytest.raises(ValueError, match="teacher_log_probs must be natural logarithms"):
        loss_and_gradient(student(2), ids, log_probs)
    weights = torch.tensor([1.0, 0.0])  # such a token may hold anything
    assert loss_and_gradient(student(2), ids, log_probs, token_weights=weights)[0][1] == 0
    ids[1, 0] = -1  # padding
    assert loss_and_gradient(student(2), ids, log_probs)[0].isfinite().all()


@pytest.mark.parametrize("wrong", [torch.nan, torch.inf, 0.5])
@pytest.mark.parametrize("remainder", ["tail", "renormalize", "drop", "teacher_renormalize"])
def test_what_is_no_log_probability_makes_the_loss_nan_elsewhere(wrong, remainder, monkeypatch):
    """Values on a GPU are not read; here the CPU's check is left out."""
    monkeypatch.setattr(checks.tensors, "check_teacher_entries", lambda *given: None)
    ids, log_probs = torch.tensor([[3, 5], [1, 0]]), torch.tensor([[-0.5, -1.5], [wrong, -1.5]])
    for tail_floor in (None, 1e-7) if remainder == "tail" else (None,):
        choices = {"remainder": remainder, "tail_floor": tail_floor}
        loss, gradient = loss_and_gradient(student(2), ids, log_probs, **choices)
        assert loss[0].isfinite()
        assert gradient[0].isfinite().all()
        assert loss[1].isnan()
        assert gradient[1].isnan().any()
