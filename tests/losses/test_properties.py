"""Identities that hold for any input."""

import pytest
import torch
from cases import make_case
from closeness import TOLERANCE

pytest.importorskip("hypothesis")
from hypothesis import given, settings
from hypothesis import strategies as st

import fused_sd

DIVERGENCES = st.one_of(
    st.sampled_from(["forward_kl", "reverse_kl"]),
    st.floats(0.01, 0.99).map(fused_sd.Jsd),
    st.floats(0.0, 1.0).map(fused_sd.MixedKl),
)
SLACK = TOLERANCE[torch.float64]


@st.composite
def sides(draw, max_tokens=5):
    """Student and teacher over the same vocabulary, from nearly equal to far apart."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    num_tokens, vocab = draw(st.integers(0, max_tokens)), draw(st.integers(2, 40))
    scale = draw(st.sampled_from([1e-6, 1e-2, 1.0, 8.0]))

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    hidden, head = normal(num_tokens, 6), 3 * normal(vocab, 6)
    return hidden, head, hidden + scale * normal(num_tokens, 6), head


def token_loss(pair, **choices):
    return fused_sd.divergence_loss(*pair, reduction="sum", **choices).token_loss


common = settings(max_examples=60, deadline=None)


@common
@given(sides(), DIVERGENCES, st.integers(1, 40), st.sampled_from(["student", "teacher", "union"]))
def test_a_tail_bucket_never_exceeds_the_full_divergence(pair, divergence, k, side):
    k = min(k, pair[1].shape[0])
    top = {"student": fused_sd.StudentTopK, "teacher": fused_sd.TeacherTopK}
    support = top.get(side, fused_sd.UnionTopK)(k)
    full = token_loss(pair, divergence=divergence)
    tail = token_loss(pair, divergence=divergence, support=support)
    assert (full >= 0).all()
    assert (tail >= 0).all()
    assert (tail <= full + SLACK * (1 + full)).all()
    if k == pair[1].shape[0]:
        assert torch.allclose(tail, full, rtol=1e-8, atol=SLACK)


@common
@given(sides(), st.floats(0.01, 0.99))
def test_jsd_is_symmetric_and_bounded_by_both_mixtures(pair, beta):
    mine = token_loss(pair, divergence=fused_sd.Jsd(beta))
    swapped = token_loss((*pair[2:], *pair[:2]), divergence=fused_sd.Jsd(1 - beta))
    assert torch.allclose(mine, swapped, rtol=1e-7, atol=SLACK)
    entropy = -(beta * torch.tensor(beta).log() + (1 - beta) * torch.tensor(1 - beta).log())
    assert (mine <= entropy + 1e-6).all()


@common
@given(sides(), DIVERGENCES, st.floats(-3, 3), st.integers(1, 6))
def test_weights_are_linear_and_chunks_invisible(pair, divergence, scale, chunk_size):
    weights = torch.linspace(-1, 2, pair[0].shape[0], dtype=torch.float64)
    one = fused_sd.divergence_loss(
        *pair, divergence=divergence, token_weights=weights, reduction="sum"
    ).loss
    other = fused_sd.divergence_loss(
        *pair,
        divergence=divergence,
        token_weights=scale * weights,
        chunk_size=chunk_size,
        reduction="sum",
    ).loss
    assert torch.allclose(other, scale * one, rtol=1e-8, atol=SLACK)


@common
@given(sides(), DIVERGENCES, st.integers(0, 5))
def test_concatenated_batches_add(pair, divergence, cut):
    whole = fused_sd.divergence_loss(*pair, divergence=divergence, reduction="sum").loss
    parts = [
        fused_sd.divergence_loss(
            pair[0][at], pair[1], pair[2][at], pair[3], divergence=divergence, reduction="sum"
        )
        for at in (slice(None, cut), slice(cut, None))
    ]
    assert torch.allclose(whole, sum(part.loss for part in parts), rtol=1e-9, atol=SLACK)


@common
@given(sides(), st.integers(1, 39))
def test_the_gradient_by_a_renormalised_support_is_sparse(pair, k):
    hidden, head, *teacher = pair
    k = min(k, head.shape[0])
    head = head.clone().requires_grad_(True)
    chosen = fused_sd.StudentTopK(k)
    fused_sd.divergence_loss(
        hidden, head, *teacher, support=chosen, remainder="renormalize", reduction="sum"
    ).loss.backward()
    ids = (hidden @ head.T).topk(k).indices.flatten().tolist()
    untouched = [row for row in range(head.shape[0]) if row not in ids]
    assert (head.grad[untouched] == 0).all()


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", fused_sd.Jsd(0.5)], ids=str)
@pytest.mark.parametrize("remainder", ["renormalize", "teacher_renormalize", "drop", "tail"])
def test_a_token_that_names_no_entry_has_no_loss(remainder, divergence):
    if remainder == "teacher_renormalize":
        divergence = "forward_kl"
    case = make_case(3)
    support = fused_sd.TokenIds(torch.tensor([[1, 2, 3], [-1, -1, -1], [4, -1, 4]]))
    output = fused_sd.divergence_loss(
        *(case.hidden, case.head, case.teacher_hidden, case.teacher_head),
        **{"support": support, "remainder": remainder, "divergence": divergence},
        reduction="sum",
    )
    output.loss.backward()
    assert output.token_loss[1].abs() <= 1e-12
    assert output.token_loss.isfinite().all()
    assert case.hidden.grad.isfinite().all()
    assert (case.hidden.grad[1].abs() <= 1e-12).all()
