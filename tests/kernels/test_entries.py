"""The twins on chosen entries: taken out of their rows, compared, written into a gradient."""

import pytest
import torch
from closeness import assert_close
from divergences import EACH

from fused_sd.terms.divergence_term import divergence_term
from fused_sd.torch_kernels import entries, rows
from fused_sd.torch_kernels.rows import EntryGradient

pytest.importorskip("triton")
from fused_sd.kernels import entries as kernels
from fused_sd.kernels import rows as row_kernels

pytestmark = [
    pytest.mark.kernels,
    pytest.mark.filterwarnings("ignore:.*encountered in.*:RuntimeWarning"),
]
DIVERGENCES = tuple(divergence for divergence, _ in EACH.values())
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
VOCAB, WIDTH, K = 4201, 4208, 5


def make_logits():
    """Rows of 4201 logits in memory of 4208 columns, -inf behind."""
    logits = torch.full((4, WIDTH), -torch.inf)
    logits[:, :VOCAB] = 4 * torch.randn(4, VOCAB)
    return logits.to(DEVICE)


def make_columns():
    """Distinct columns; the last row names the padding twice."""
    columns = torch.stack([torch.randperm(VOCAB)[:K] for _ in range(4)])
    columns[3, 1:3] = WIDTH - 1
    return columns.to(DEVICE)


def test_entries_are_taken_out():
    logits, columns = make_logits(), make_columns()
    exact = logits.double()
    found = kernels.take_out_(logits, columns)
    expected = entries.take_out_(exact, columns)
    assert torch.equal(found[0].double(), expected[0])
    assert_close(found[1], expected[1], torch.float32)
    assert torch.equal(logits.double(), exact)
    assert (logits.gather(1, columns) == -torch.inf).all()


def test_a_row_of_entries_alone_leaves_nothing():
    logits = torch.randn(2, K, device=DEVICE)
    columns = torch.arange(K, device=DEVICE).expand(2, K)
    for module in (kernels, entries):
        found, rest = module.take_out_(logits.clone(), columns)
        assert torch.equal(found, logits)
        assert (rest == -torch.inf).all()


@pytest.mark.parametrize("divergence", DIVERGENCES, ids=str)
@pytest.mark.parametrize("entry_clip", [None, 0.02])
@pytest.mark.parametrize("has_tail", [False, True])
def test_entries_are_compared(divergence, entry_clip, has_tail):
    student = 3 * torch.randn(4, K, device=DEVICE)
    teacher = student + 0.3 * torch.randn_like(student)
    student[1, 2] = teacher[1, 2] = -torch.inf  # not compared
    student[2], teacher[2] = -torch.inf, -torch.inf  # nothing is compared
    rests = (torch.tensor([1.0, 2.0, 3.0, -torch.inf], device=DEVICE),) * 2
    rests = (rests[0], rests[1] + 0.1) if has_tail else None
    term = divergence_term(divergence)
    found = kernels.compare_entries(student, teacher, rests, term, entry_clip)
    wide = None if rests is None else tuple(rest.double() for rest in rests)
    expected = entries.compare_entries(student.double(), teacher.double(), wide, term, entry_clip)
    for name in ("loss", "inside", "outside", "background"):
        value, truth = getattr(found, name), getattr(expected, name)
        assert (value is None) == (truth is None)
        if value is not None:  # cut terms cancel: digits are those of a probability
            assert ((value.double() - truth).abs() <= 1e-5 * truth.abs() + 1e-6).all(), name
    assert (found.clipped is None) == (entry_clip is None)
    if entry_clip is not None:
        assert torch.equal(found.clipped.double(), expected.clipped.double())
    if has_tail:
        for value, truth in zip(found.lses, expected.lses, strict=True):
            assert_close(value, truth, torch.float32)
    assert found.loss[2] == 0
    assert (found.inside[2] == 0).all()


@pytest.mark.parametrize("has_tail", [False, True])
@pytest.mark.parametrize("divergence", DIVERGENCES, ids=str)
def test_equal_entries_give_exactly_zero(divergence, has_tail):
    student = 3 * torch.randn(4, K, device=DEVICE)
    rests = (student[:, 0] + 1,) * 2 if has_tail else None
    for module in (kernels, entries):
        found = module.compare_entries(student, student, rests, divergence_term(divergence), None)
        assert (found.loss == 0).all()
        assert (found.inside == 0).all()


@pytest.mark.parametrize("gap, bound", [(1e-4, 0.03), (1e-3, 0.003)])
@pytest.mark.parametrize("divergence", DIVERGENCES, ids=str)
def test_small_divergences_keep_their_digits(divergence, gap, bound):
    student = 3 * torch.randn(4, 100, device=DEVICE)
    teacher, term = student + gap * torch.randn_like(student), divergence_term(divergence)
    rests = student.logsumexp(-1), teacher.logsumexp(-1)
    found = kernels.compare_entries(student, teacher, rests, term, None)
    wide = tuple(rest.double() for rest in rests)
    exact = entries.compare_entries(student.double(), teacher.double(), wide, term, None)
    assert ((found.loss.double() - exact.loss).abs() <= bound * exact.loss).all()
    error = (found.inside.double() - exact.inside).norm(dim=-1)
    assert (error <= bound * exact.inside.norm(dim=-1)).all()


def test_more_entries_than_a_program_holds_are_compared_in_pytorch(monkeypatch):
    student, teacher = torch.randn(2, 4, K, device=DEVICE)
    term = divergence_term("reverse_kl")
    one = kernels.compare_entries(student, teacher, None, term, None)
    monkeypatch.setattr(kernels, "MOST", 2)
    other = kernels.compare_entries(student, teacher, None, term, None)
    assert_close(one.loss, other.loss.double(), torch.float32)
    logits, columns = make_logits(), make_columns()
    assert torch.equal(kernels.take_out_(logits.clone(), columns)[0], logits.gather(1, columns))


@pytest.mark.parametrize("cap", [None, 30.0])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_entries_have_gradients_of_their_own(cap, weighted, dtype):
    logits, columns = make_logits(), make_columns()
    lse, constant = logits.logsumexp(-1), torch.randn(4, device=DEVICE)
    values = torch.randn(4, K, device=DEVICE)
    weights = None
    if weighted:
        weights = torch.tensor([1.5, 0.0, -2.0, 0.5], device=DEVICE)
        values[1, 0] = constant[1] = torch.inf
    given = EntryGradient(columns, logits.gather(1, columns).clamp(min=-9), values, weights)
    exact = logits.double()
    wide = EntryGradient(
        columns,
        given.logits.double(),
        values.double(),
        None if weights is None else weights.double(),
    )
    rows.softmax_gradient_(exact, lse.double(), constant.double(), None, cap, exact, wide)
    out = logits if dtype == torch.float32 else torch.empty_like(logits, dtype=dtype)
    row_kernels.softmax_gradient_(logits, lse, constant, None, cap, out, given)
    found, truth = out[:, :VOCAB].double(), exact[:, :VOCAB]
    assert ((found - truth).abs() <= 2.0**-8 * truth.abs() + 1e-6).all()
    if weighted:
        assert (found[1] == 0).all()
