"""``kernels/rows.py`` against its PyTorch twin in float64; interpreted without a GPU."""

import contextlib

import pytest
import torch
from cases import make_case
from closeness import assert_close
from divergences import EACH

import fused_sd
from fused_sd import reference
from fused_sd.engine.backend import choose_functions
from fused_sd.terms.divergence import DIVERGENCES as DEFINITIONS
from fused_sd.terms.divergence_term import divergence_term
from fused_sd.torch_kernels import rows
from fused_sd.torch_kernels.rows import RowGradient

triton = pytest.importorskip("triton")
from fused_sd.kernels import divergence as kernel_divergence
from fused_sd.kernels import rows as kernels

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DIVERGENCES = tuple(divergence for divergence, _ in EACH.values())
pytestmark = [
    pytest.mark.kernels,
    # the interpreter computes both branches of a select in numpy, which warns of inf - inf
    pytest.mark.filterwarnings("ignore:.*encountered in.*:RuntimeWarning"),
]


def make_rows(num_columns=4201, gap=0.3, missing=True):
    """Logits of both sides in fp32; 4201 is three blocks of columns, the last one ragged."""
    student = torch.randn(3, num_columns) * 4
    teacher = student + gap * torch.randn(3, num_columns)
    if missing:
        student[0, 5] = teacher[0, 5] = teacher[1, 7] = -torch.inf
        student[:, -3:] = teacher[:, -3:] = -torch.inf
    return student.to(DEVICE), teacher.to(DEVICE)


def test_the_twins_have_the_same_names():
    names = {"log_normalizer", "lse_and_entropy", "normalizers", "divergence_"}
    names |= {"known_normalizers", "softmax_gradient_", "row_metrics"}
    for module in (rows, kernels):
        assert all(callable(getattr(module, name)) for name in names)
    assert set(kernel_divergence.TERMS) == set(DEFINITIONS)
    assert {divergence_term(divergence).name for divergence in DIVERGENCES} == set(DEFINITIONS)


@pytest.mark.parametrize("num_columns", [1, 3, 2048, 4201])
def test_the_first_of_the_largest(num_columns):
    student, teacher = (side.round() for side in make_rows(num_columns, missing=num_columns > 10))
    student[1], teacher[2] = 2.0, -torch.inf  # all equal; no mass at all
    found = kernels.normalizers(student, teacher, has_largest=True).largest
    assert torch.equal(found[:, 0], student.argmax(-1))
    assert torch.equal(found[:2, 1], teacher[:2].argmax(-1))
    assert torch.equal(rows.normalizers(student, teacher, has_largest=True).largest[:2], found[:2])
    assert kernels.normalizers(student, teacher).largest is None


@pytest.mark.parametrize("num_columns", [1, 3, 2048, 4201])
def test_statistics(num_columns):
    student, _ = make_rows(num_columns, missing=num_columns > 10)
    exact, entropy = rows.lse_and_entropy(student.double())
    assert_close(kernels.log_normalizer(student), exact, torch.float32)
    found = kernels.lse_and_entropy(student)
    assert_close(found[0], exact, torch.float32)
    if num_columns > 1:
        assert_close(found[1], entropy, torch.float32)


def test_statistics_of_rows_without_any_mass_before_a_block():
    student, _ = make_rows()
    student[1, :3000] = -torch.inf
    assert_close(kernels.log_normalizer(student), student.double().logsumexp(-1), torch.float32)
    student[2] = -torch.inf
    assert kernels.log_normalizer(student)[2] == -torch.inf


def compare(
    module, student, teacher, divergence, entry_clip=None, row_weights=None, cap=None, out=None
):
    sides = module.normalizers(student, teacher)
    term = divergence_term(divergence)
    gradient = None if row_weights is None else RowGradient(row_weights, cap, out)
    found = module.divergence_(student, teacher, sides, term, entry_clip, gradient)
    clipped = torch.zeros_like(found.loss) if entry_clip is None else found.clipped
    return found.loss, clipped


@pytest.mark.parametrize("divergence", DIVERGENCES, ids=str)
@pytest.mark.parametrize("entry_clip", [None, 0.02])
@pytest.mark.parametrize("cap", [None, 40.0])
def test_divergence_and_gradient(divergence, entry_clip, cap):
    student, teacher = make_rows(missing=False)
    student[0, 5] = teacher[0, 5] = -torch.inf
    student[:, -3:] = teacher[:, -3:] = -torch.inf
    row_weights = torch.tensor([1.0, 0.0, -2.0], device=DEVICE)
    found = []
    for module, dtype in ((kernels, torch.float32), (rows, torch.float64)):
        pair = student.clone().to(dtype), teacher.to(dtype)
        alone = compare(module, *pair, divergence, entry_clip)
        result = compare(module, *pair, divergence, entry_clip, row_weights.to(dtype), cap, pair[0])
        for value, other in zip(alone, result, strict=True):  # the gradient changes nothing else
            assert_close(value, other, dtype)
        found.append((*result, pair[0]))
    mine, exact = found
    assert_close(mine[0], exact[0], torch.float32, "loss")
    assert_close(mine[1], exact[1], torch.float32, "clipped")
    assert_close(mine[2], exact[2], torch.float32, "gradient")
    assert (mine[2][1] == 0).all()


@pytest.mark.parametrize("divergence", DIVERGENCES, ids=str)
@pytest.mark.parametrize("entry_clip", [None, 0.02])
@pytest.mark.parametrize("kind", ["near", "far", "one-sided"])
def test_near_and_general_forms_agree(divergence, entry_clip, kind):
    """Rows without large log-ratios are evaluated in forms of their own on a CPU."""
    student, teacher = (side.double() for side in make_rows(300, missing=False))
    if kind == "far":
        teacher = teacher * 8
    elif kind == "one-sided":
        teacher[1, 4] = -torch.inf
    term = divergence_term(divergence)
    log_s, log_t = student.log_softmax(-1), teacher.log_softmax(-1)
    if entry_clip is None:
        value, dlog_s = term.function(log_s, log_t, term.parameter)
        cut = torch.zeros_like(value)
    else:
        value, dlog_s, cut = term.clipped(log_s, log_t, entry_clip)
    dlogits = dlog_s - log_s.exp() * dlog_s.sum(-1, keepdim=True)
    gradient = torch.empty_like(student)
    ones = torch.ones(3, dtype=torch.float64)
    loss, clipped = compare(rows, student, teacher, divergence, entry_clip, ones, None, gradient)
    finite = value.sum(-1).isfinite()
    assert_close(loss, value.sum(-1), torch.float64)
    assert_close(clipped, cut.double().sum(-1), torch.float64)
    assert_close(gradient[finite], dlogits[finite], torch.float64)


@pytest.mark.parametrize("divergence", DIVERGENCES, ids=str)
def test_sides_that_are_far_apart_stay_finite(divergence):
    """The exponential of a log-ratio of 99 is beyond fp32."""
    student, teacher = torch.zeros(2, 40, device=DEVICE), torch.zeros(2, 40, device=DEVICE)
    student[0, 3] = teacher[1, 5] = 100.0
    ones = torch.ones(2, device=DEVICE)
    found = []
    for module, dtype in ((rows, torch.float64), (kernels, torch.float32), (rows, torch.float32)):
        pair = student.to(dtype), teacher.to(dtype)
        gradient = torch.empty_like(pair[0])
        loss, _ = compare(module, *pair, divergence, None, ones.to(dtype), None, gradient)
        found.append((loss, gradient))
    for loss, gradient in found[1:]:
        assert_close(loss, found[0][0], torch.float32)
        assert_close(gradient, found[0][1], torch.float32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bit_gradients_are_rounded_once(dtype):
    student, teacher = make_rows(missing=False)
    ones = torch.ones(3, device=DEVICE)
    wide, narrow = torch.empty_like(student), torch.empty_like(student, dtype=dtype)
    before = student.clone()
    for out in (wide, narrow):
        compare(kernels, student, teacher, "reverse_kl", None, ones, None, out)
    assert torch.equal(narrow, wide.to(dtype))
    assert torch.equal(student, before)  # nothing is written but the gradient


@pytest.mark.parametrize("slope", [None, 0.7])
@pytest.mark.parametrize("cap", [None, 40.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_softmax_gradient(slope, cap, dtype):
    student, _ = make_rows()
    lse = kernels.log_normalizer(student)
    constant = torch.tensor([1.0, 0.0, -2.0], device=DEVICE)
    slopes = None if slope is None else torch.full_like(constant, slope)
    exact = student.double()
    rows.softmax_gradient_(
        exact,
        rows.log_normalizer(student.double()),
        constant.double(),
        None if slopes is None else slopes.double(),
        cap,
        exact,
    )
    found = student if dtype == torch.float32 else torch.empty_like(student, dtype=dtype)
    kernels.softmax_gradient_(student, lse, constant, slopes, cap, found)
    if dtype == torch.float32:
        assert_close(found, exact, dtype)
    else:
        assert ((found.double() - exact).abs() <= 2.0**-8 * exact.abs() + 1e-6).all()


def test_summary():
    student, teacher = make_rows(missing=False)
    student[0, 5] = teacher[0, 5] = -torch.inf
    names = rows.ROW_METRICS
    mine = kernels.row_metrics(student, teacher, kernels.normalizers(student, teacher), names)
    pair = student.double(), teacher.double()
    exact = rows.row_metrics(*pair, rows.normalizers(*pair), names)
    assert set(mine) == set(exact) == set(names)
    for name, value in mine.items():
        assert_close(value, exact[name], torch.float32, name)


@pytest.mark.parametrize("divergence", DIVERGENCES, ids=str)
@pytest.mark.parametrize("gap, bound", [(1e-4, 0.03), (1e-3, 0.003), (1e-2, 3e-4)])
def test_small_divergences_keep_their_digits(divergence, gap, bound):
    student, teacher = make_rows(20_000, gap, missing=False)
    ones = torch.ones(3, device=DEVICE)
    exact_gradient = torch.empty(student.shape, dtype=torch.float64, device=DEVICE)
    pair = student.double(), teacher.double()
    exact, _ = compare(rows, *pair, divergence, None, ones.double(), None, exact_gradient)
    for module in (kernels, rows):
        gradient = torch.empty_like(student)
        loss, _ = compare(module, student, teacher, divergence, None, ones, None, gradient)
        assert ((loss.double() - exact).abs() <= bound * exact).all()
        assert (loss >= 0).all()
        error = (gradient.double() - exact_gradient).norm(dim=-1) / exact_gradient.norm(dim=-1)
        assert (error <= bound).all()


def test_equal_rows_give_exactly_zero():
    student, _ = make_rows()
    ones = torch.ones(3, device=DEVICE)
    for divergence in DIVERGENCES:
        for module in (kernels, rows):
            gradient = torch.full_like(student, torch.nan)
            loss, _ = compare(module, student, student, divergence, None, ones, None, gradient)
            assert (loss == 0).all()
            assert (gradient == 0).all()


def test_no_rows():
    empty = torch.empty(0, 100, device=DEVICE)
    for module in (kernels, rows):
        lse = module.log_normalizer(empty)
        assert lse.shape == (0,)
        module.softmax_gradient_(empty, lse, lse, None, None, empty)
        assert compare(module, empty, empty, fused_sd.Jsd(0.5))[0].shape == (0,)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("settings", ["full", "clip", "tail", "renormalize", "drop", "union"])
def test_losses_through_triton_equal_the_reference(dtype, settings, poisoned_memory):
    case = make_case(vocab=1009, bias=True, dtype=dtype, softcap=30.0)
    for name, value in vars(case).items():
        if isinstance(value, torch.Tensor):
            setattr(case, name, value.detach().to(DEVICE))
    case = case.to(dtype)
    top = fused_sd.StudentTopK(2)
    chosen = {
        "full": {},
        "clip": {"entry_clip": 0.05, "divergence": "forward_kl"},
        "tail": {"support": top, "divergence": fused_sd.Jsd(0.5)},
        "renormalize": {"support": top, "remainder": "renormalize"},
        "drop": {"support": top, "remainder": "drop"},
        "union": {"support": fused_sd.UnionTopK(2), "divergence": "forward_kl"},
    }[settings]
    sides = case.hidden, case.head, case.teacher_hidden, case.teacher_head
    weights = {"token_weights": case.token_weights, "chunk_size": 3, "reduction": "sum"}
    output = fused_sd.divergence_loss(*sides, backend="triton", **chosen, **weights)
    found = torch.autograd.grad(output.loss, case.inputs)
    double = case.to(torch.float64)
    sides = double.hidden, double.head, double.teacher_hidden, double.teacher_head
    weights["token_weights"] = double.token_weights
    exact = fused_sd.divergence_loss(*sides, backend="torch", **chosen, **weights)
    expected = torch.autograd.grad(exact.loss, double.inputs)
    assert_close(output.loss, exact.loss, torch.float32)
    for value, truth in zip(found, expected, strict=True):
        error = float((value.double() - truth).norm() / truth.norm())
        assert error <= (1e-5 if dtype == torch.float32 else 5e-3)


def test_token_path_through_triton():
    case = make_case(vocab=1009, dtype=torch.float32)
    hidden, weight = case.hidden.detach().to(DEVICE), case.weight.detach().to(DEVICE)
    hidden.requires_grad_(True)
    ids = case.token_ids.to(DEVICE)
    found = fused_sd.token_log_probs(hidden, weight, ids, entropy=True, backend="triton")
    logits = reference.logits(hidden, weight)
    assert_close(found.log_probs, reference.token_log_prob(logits, ids), torch.float32)
    assert_close(found.entropy, reference.entropy(logits), torch.float32)
    row_weights = torch.randn(2, 7, device=DEVICE)
    loss = (found.log_probs * row_weights[0] + found.entropy * row_weights[1]).sum()
    exact = reference.token_log_prob(logits, ids) * row_weights[0].double()
    exact = (exact + reference.entropy(logits) * row_weights[1].double()).sum()
    one, other = (torch.autograd.grad(x, hidden)[0] for x in (loss, exact))
    assert_close(one, other, torch.float32)


def test_kernels_are_launched_on_the_gpu_that_holds_the_logits(monkeypatch):
    """The current GPU may be another: a model spread over GPUs has its head on the last."""
    entered = []

    @contextlib.contextmanager
    def device_of(tensor):
        entered.append(tensor)
        yield

    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    student, teacher = make_rows(300)
    compare(kernels, student, teacher, "reverse_kl")
    assert len(entered) == 2
    assert all(tensor is student for tensor in entered)


def test_triton_where_it_cannot_run_is_an_error(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match="Triton needs a GPU"):
        choose_functions("triton", torch.device("cpu"), torch.float32)
    with pytest.raises(ValueError, match="float64"):
        choose_functions("triton", torch.device("cuda"), torch.float64)
