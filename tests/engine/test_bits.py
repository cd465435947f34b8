"""Which results are equal to the bit, on any CPU, and how far apart the others may be.

How a BLAS orders the sums of a matrix product depends on the shapes, on the CPU, on the number of
threads, and for some rows on their place among the others.  Two results are equal to the bit where
the library makes the same calls on the same shapes and strides; otherwise they are equal up to
rounding, which these tests bound by the size of what is summed.

Dimension key:  N tokens, D hidden size, V vocabulary
"""

import itertools

import pytest
import torch
from cases import make_case
from closeness import assert_same_up_to_rounding

import fused_sd
from fused_sd.engine import gradients
from fused_sd.engine.certificate import TOLERANCE, radius, rounding
from fused_sd.head.lm_head import LMHead

pytestmark = pytest.mark.bits

DTYPES = [torch.float64, torch.float32, torch.bfloat16]
SIZES = [(1, 12, 67), (15, 16, 97), (33, 64, 211)]  # N, D, V
SUPPORTS = {
    "full": {},
    "student": {"support": fused_sd.StudentTopK(4)},
    "renormalized": {"support": fused_sd.TeacherTopK(4), "remainder": "renormalize"},
}


def case_of(*sizes, dtype):
    """Numbers of as many digits as the dtype has: sums of 16-bit ones are exact in float64."""
    case = make_case(*sizes, dtype=dtype)
    for name in ("hidden", "weight", "teacher_hidden"):
        tensor = getattr(case, name).detach()
        setattr(case, name, tensor + 2**-6 * torch.randn_like(tensor))
    for tensor in case.inputs:
        tensor.requires_grad_()
    return case


def loss_of(hidden, head, teacher, teacher_head, **settings):
    return fused_sd.divergence_loss(
        *(hidden, head, teacher, teacher_head),
        divergence=fused_sd.Jsd(0.3),
        **{"reduction": "sum", **settings},
    )


@pytest.mark.parametrize("chunk_size", [None, 4])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("support", SUPPORTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_loss_has_the_same_bits_whatever_gradient_is_wanted(dtype, support, sizes, chunk_size):
    """With one chunk size, and whether the teacher's head is the student's or an equal one: the
    GEMMs are the same.
    """
    case = case_of(*sizes, dtype=dtype)
    run = {**SUPPORTS[support], "chunk_size": chunk_size, "token_weights": case.token_weights}
    heads = case.weight, case.weight.detach().clone()
    for reduction, kind, teacher_head in itertools.product(("sum", "none"), (0, 1, 2), heads):
        run["reduction"] = reduction
        given = [{}, {}, {"gradient": "sparse", "tolerance": 2**-3}][kind]
        with torch.set_grad_enabled(kind > 0):
            output = loss_of(
                *(case.hidden, case.weight, case.teacher_hidden, teacher_head), **run, **given
            )
        if kind:
            output.loss.sum().backward()
        if kind == 0 and teacher_head is case.weight:
            expected = output
        assert torch.equal(output.loss, expected.loss)
        assert torch.equal(output.token_loss, expected.token_loss)


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("support", SUPPORTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_teacher_equal_to_the_student_gives_exactly_zero_in_every_way(dtype, support, sizes):
    """Both sides' logits come from GEMMs of one shape and one stride, or from dot products."""
    case = case_of(*sizes, dtype=dtype)
    equal = case.hidden.detach().clone()
    heads = case.weight, case.weight.detach().clone()
    for chunk_size, reduction, head in itertools.product((None, 4), ("sum", "none"), heads):
        run = {**SUPPORTS[support], "chunk_size": chunk_size, "reduction": reduction}
        with torch.no_grad():
            assert not loss_of(case.hidden, case.weight, equal, head, **run).loss.any()
        for kind in ({}, {"gradient": "sparse"}):
            output = loss_of(case.hidden, case.weight, equal, head, **run, **kind)
            assert not output.loss.any()
            for gradient in torch.autograd.grad(output.loss.sum(), (case.hidden, case.weight)):
                assert not gradient.any()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_chunks_change_a_loss_and_its_gradients_by_rounding_alone(dtype):
    """Sizes are of the sums that a BLAS may order otherwise: of a logit, and of both gradients."""
    case = case_of(33, 64, 211, dtype=dtype)
    found = []
    for chunk_size in (1, 4, 7, 33):
        output = loss_of(
            *(case.hidden, case.weight, case.teacher_hidden, case.weight),
            chunk_size=chunk_size,
            reduction="sum",
        )
        found.append((output.token_loss, *torch.autograd.grad(output.loss, case.inputs)))
    lengths = case.hidden.detach().norm(dim=-1), case.weight.detach().norm(dim=-1)
    logit = float(lengths[0].max() * lengths[1].max())  # |h| |W_v|: of the products' magnitudes
    for loss, dhidden, dweight in found:
        assert_same_up_to_rounding(loss, found[0][0], 1, logit)
        assert_same_up_to_rounding(dhidden, found[0][1], 1, logit * float(lengths[1].max()))
        assert_same_up_to_rounding(dweight, found[0][2], 1, logit * float(lengths[0].sum()))


def flat_and_peaked(dtype, vocab=20011, num_tokens=24):
    """Operands of which every third row is too flat to be sparse, and their head."""
    case = make_case(num_tokens, 32, vocab, peak=25.0, dtype=dtype)
    case.hidden = case.hidden.detach() + 2**-6 * torch.randn_like(case.hidden)
    scale = torch.where(torch.arange(num_tokens) % 3 == 1, 0.05, 1.0)[:, None].to(dtype)
    hidden = (case.hidden.detach() * scale).requires_grad_()
    teacher = hidden.detach() + 0.1 * scale * torch.randn_like(hidden)
    return hidden, case.weight.detach(), teacher


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_a_certificate_bounds_the_rounding_of_dense_rows(dtype, reduction, monkeypatch):
    monkeypatch.setattr(gradients, "MOST", 64)
    hidden, head, teacher = flat_and_peaked(dtype)
    run = {"reduction": reduction, "chunk_size": 5}
    outputs = [
        fused_sd.divergence_loss(hidden, head, teacher, head, **run, **kind)
        for kind in ({}, {"gradient": "sparse", "tolerance": TOLERANCE})
    ]
    assert torch.equal(outputs[0].loss, outputs[1].loss)
    certificate = outputs[1].certificate
    assert 0 < certificate.dense.sum() < 12
    dense, sparse = (torch.autograd.grad(o.loss.sum(), hidden)[0].double() for o in outputs)
    error, bound = (sparse - dense).norm(dim=-1), certificate.hidden_bound(head).double()
    assert (error <= bound).all()
    assert (bound[certificate.dense] > 0).all()
    if dtype != torch.bfloat16:  # whose own rounding is as coarse as the tolerance
        dropped = TOLERANCE * certificate.norm * radius(LMHead(head))[0]
        assert (bound < dropped / 20)[certificate.dense].all()


def test_the_bound_of_a_rounding_is_near_what_a_plain_sum_loses():
    """One number after the other in fp32, as a BLAS may sum few rows: blocks lose far less."""
    logits, head = torch.randn(3, 50_021) * 2.2, torch.randn(50_021, 8) + torch.randn(8)
    gradient = logits.softmax(-1)
    gradient[:, 0] -= 1
    products = gradient[:, :, None] * head
    plain = torch.zeros(3, 8)
    for product in products.unbind(1):
        plain += product
    exact = products.double().sum(1)
    units = gradient.abs().sum(-1).double() * head.double().norm(dim=-1).max()
    found = (plain - exact).norm(dim=-1) / units
    assert (found <= rounding(LMHead(head))).all()
    assert found.max() >= rounding(LMHead(head)) / 100
