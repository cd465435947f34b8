"""``top_k`` and ``select`` in Triton against brute force in float64; interpreted without a GPU."""

import pytest
import torch

pytest.importorskip("triton")
from fused_sd.kernels import selection as kernels
from fused_sd.torch_kernels import selection

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
PRIME = 4201  # columns: over 32 blocks of 128, and one of 105
pytestmark = [
    pytest.mark.kernels,
    # the interpreter computes both branches of a select in numpy, which warns of inf - inf
    pytest.mark.filterwarnings("ignore:.*encountered in.*:RuntimeWarning"),
]


def brute_top_k(logits, k):
    """Ids of the k largest values from a sort of pairs: by value, then by id."""
    rows = logits.double().nan_to_num(nan=torch.inf, posinf=torch.inf, neginf=-torch.inf).tolist()
    ids = [sorted(range(len(row)), key=lambda v, row=row: (-row[v], v))[:k] for row in rows]
    return torch.tensor(ids, dtype=torch.int64, device=logits.device).reshape(len(rows), k)


def rows_of(kind, num_columns, dtype=torch.float32):
    """Three rows of one kind."""
    values = torch.randn(3, num_columns, device=DEVICE)
    if kind == "equal":
        values = torch.full_like(values, 0.25)
    elif kind == "tied":
        values = (values * 2).round() / 2  # -0 among them
    elif kind == "one":
        values = values * 1e-6
        values[:, num_columns // 2] = 3.0
    elif kind == "geometric":
        values = values.sign() * 0.5 ** torch.arange(num_columns, device=DEVICE)
    elif kind == "subnormal":
        values = values * 1e-39
    elif kind == "zero":
        values = torch.zeros_like(values)
    elif kind == "sparse":
        values = values * (torch.rand_like(values) < 0.002)
    elif kind == "heavy":
        values = values / (1e-3 + torch.rand_like(values))
    elif kind == "alternating":
        values = values.abs() + 1
        values[:, ::2] *= -1
    return values.to(dtype)


KINDS = ["normal", "equal", "tied", "one", "geometric", "subnormal", "zero", "sparse", "heavy"]


def one_row_of_each(kinds, num_columns, dtype=torch.float32):
    return torch.cat([rows_of(kind, num_columns, dtype)[:1] for kind in kinds])


@pytest.mark.parametrize("k", [1, 5])
def test_top_k(k):
    logits = one_row_of_each(KINDS, PRIME)
    found = kernels.top_k(logits, k)
    assert found.dtype == torch.int64
    assert torch.equal(found, brute_top_k(logits, k))
    assert torch.equal(found, selection.top_k(logits, k))


@pytest.mark.parametrize("num_columns, k", [(1, 1), (7, 7), (300, 300), (4099, 900)])
def test_top_k_of_rows_that_fit_a_program(num_columns, k):
    logits = rows_of("tied", num_columns)
    assert torch.equal(kernels.top_k(logits, k), brute_top_k(logits, k))


@pytest.mark.parametrize("k", [257, 1100])
def test_top_k_of_many_in_narrower_blocks(k):
    logits = rows_of("tied", 32_771)[:1]
    assert torch.equal(kernels.top_k(logits, k), brute_top_k(logits, k))


def test_top_k_of_thousands_is_a_sort():
    logits = rows_of("tied", 32_771)[:1]
    k = 2049  # even blocks of 8 columns would be too many
    assert torch.equal(kernels.top_k(logits, k), brute_top_k(logits, k))


def test_top_k_keeps_to_the_vocabulary():
    """Padding, missing entries and NaN, in rows that are pieces of wider ones."""
    workspace = torch.randn(4, PRIME + 300, device=DEVICE)
    logits = workspace[:, 2 : PRIME + 2]
    vocab = PRIME - 9
    logits[:, vocab:] = -torch.inf
    logits[1, 3:] = -torch.inf
    logits[2] = -torch.inf
    logits[3, 70] = logits[3, 4000] = torch.nan
    logits[3, 90] = -torch.nan
    for k in (1, 40):
        found = kernels.top_k(logits, k)
        assert ((found >= 0) & (found < vocab)).all()
        assert torch.equal(found, brute_top_k(logits, k))
    logits[0] = torch.nan
    assert torch.equal(kernels.top_k(logits, 6)[0], torch.arange(6, device=DEVICE))


def brute_select(gradient, share, most):
    """The kept columns of each row and its sums, from the definition, in float64."""
    rows = []
    for row in gradient.double().cpu():
        sizes = row.abs()
        exponent = 128
        while exponent > -150 and int((sizes >= 2.0 ** (exponent - 1)).sum()) <= most:
            exponent -= 1
        candidates = [v for v in (sizes > 0).nonzero()[:, 0].tolist() if sizes[v] >= 2.0**exponent]
        candidates.sort(key=lambda v: -float(sizes[v]))
        budget = share * float(sizes.sum())
        others = torch.ones_like(sizes, dtype=torch.bool)
        kept = candidates
        for count in range(len(candidates) + 1):
            others[:] = True
            others[candidates[:count]] = False
            if float(sizes[others].sum()) <= budget:
                smallest = float(sizes[candidates[count - 1]]) if count else float("inf")
                kept = [v for v in candidates if float(sizes[v]) >= smallest]
                break
        others[:] = True
        others[kept] = False
        sums = float(sizes.sum()), float(sizes[others].sum()), float(row[others].sum())
        rows.append((sorted(kept), *sums))
    return rows


def check_selection(found, gradient, share, most):
    vocab = gradient.shape[1]
    assert found.columns.dtype == torch.int32
    assert found.values.dtype == torch.float32
    assert found.count.dtype == torch.int64
    assert found.columns.shape == found.values.shape == (gradient.shape[0], min(most, vocab))
    exact = brute_select(gradient, share, most)
    for row, (kept, norm, dropped, dropped_mass) in enumerate(exact):
        count = int(found.count[row])
        assert found.columns[row, :count].tolist() == kept
        assert (found.columns[row, count:] == vocab).all()
        assert torch.equal(found.values[row, :count], gradient[row, kept].float())
        assert (found.values[row, count:] == 0).all()
        tiny = 1e-44
        assert abs(float(found.norm[row]) - norm) <= 1e-6 * norm + tiny
        assert abs(float(found.dropped[row]) - dropped) <= 1e-6 * dropped + tiny
        assert abs(float(found.dropped_mass[row]) - dropped_mass) <= 1e-6 * dropped + tiny
        if abs(dropped - share * norm) > 1e-5 * norm or dropped == 0:
            assert bool(found.dropped[row] <= share * found.norm[row]) == (dropped <= share * norm)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("share, most", [(0.01, 13), (0.3, 16)])
def test_select(share, most, dtype):
    gradient = one_row_of_each([*KINDS, "alternating"], 1009, dtype)
    check_selection(kernels.select(gradient, share, most), gradient, share, most)


@pytest.mark.parametrize("share", [0.0, 0.004, 0.5, 1.5])
@pytest.mark.parametrize("most", [1, 16, 1000])
def test_select_keeps_as_few_as_the_budget_allows(share, most):
    gradient = rows_of("heavy", 509, torch.bfloat16)[:1]
    check_selection(kernels.select(gradient, share, most), gradient, share, most)


def test_entries_that_are_equal_are_kept_together():
    gradient = torch.zeros(1, 300, device=DEVICE)
    gradient[0, [7, 130, 131, 290]] = torch.tensor([4.0, -1.0, 1.0, 1.0], device=DEVICE)
    # the budget of 2.1 has space for two ones, but the three equal entries stay or go together
    found = kernels.select(gradient, 0.3, 16)
    assert found.columns[0, :5].tolist() == [7, 130, 131, 290, 300]
    assert found.dropped[0] == 0
    found = kernels.select(gradient, 3 / 7 + 1e-6, 16)
    assert found.columns[0, :2].tolist() == [7, 300]
    assert (found.dropped[0], found.dropped_mass[0]) == (3, 1)


def test_a_crowd_at_a_power_of_two_is_no_candidate():
    gradient = torch.full((1, 700), 0.5, device=DEVICE)
    gradient[0, 650] = 3.0
    found = kernels.select(gradient, 0.9, 16)
    assert found.columns[0, :2].tolist() == [650, 700]
    assert found.dropped[0] == 0.5 * 699
    assert found.dropped[0] > 0.9 * found.norm[0]


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_row_that_is_not_finite_is_within_no_budget(value):
    gradient = rows_of("heavy", 700)
    gradient[1, 300] = value
    gradient[2] = value
    found = kernels.select(gradient, 0.5, 4)
    assert found.norm.isfinite().tolist() == [True, False, False]
    assert (found.dropped <= 0.5 * found.norm).tolist()[1:] == [False, False]
    assert found.count[1:].tolist() == [0, 0]
    assert (found.columns[1:] == 700).all()
    assert (found.values[1:] == 0).all()


def test_select_reads_rows_of_a_wider_workspace():
    workspace = torch.full((3, 2 * PRIME), torch.nan, dtype=torch.bfloat16, device=DEVICE)
    gradient = workspace[:, :PRIME]
    gradient.copy_(rows_of("heavy", PRIME))
    check_selection(kernels.select(gradient, 0.05, 64), gradient, 0.05, 64)
    assert workspace[:, PRIME:].isnan().all()


@pytest.mark.parametrize("most", [1, 13, 64])
def test_what_is_kept_of_a_group_is_trimmed_and_written_without_gaps(most):
    selected = kernels.select(one_row_of_each([*KINDS, "alternating"], 509), 0.02, most)
    is_dense = torch.tensor([False, True] * 5, device=DEVICE)
    for smallest in (0.0, 0.3, torch.inf):
        threshold = torch.tensor(smallest, device=DEVICE)
        trimmed = kernels.trim(selected, threshold, is_dense)
        twin = selection.trim(selected, threshold, is_dense)
        assert torch.equal(trimmed.values, twin.values)
        assert torch.equal(trimmed.count, twin.count)
        for name in ("dropped", "dropped_mass"):
            assert torch.allclose(getattr(trimmed, name), getattr(twin, name), rtol=1e-6, atol=1e-6)
        num_values = int(trimmed.count.sum())
        found = kernels.compact(trimmed, num_values)
        for one, other in zip(found, selection.compact(twin, num_values), strict=True):
            assert one.dtype == other.dtype
            assert torch.equal(one, other)


def test_a_group_without_values_is_written_without_gaps():
    for num_rows, most in ((0, 5), (3, 0)):
        wide = torch.zeros(num_rows, most, device=DEVICE)
        of_row = wide.new_ones(num_rows)
        nothing = selection.Selection(wide.int(), wide, of_row.long(), of_row, of_row, of_row)
        trimmed = kernels.trim(nothing, wide.new_zeros(()), of_row.bool())
        assert trimmed.count.tolist() == trimmed.dropped.tolist() == [0] * num_rows
        assert [part.shape for part in kernels.compact(trimmed, 0)] == [(0,), (0,)]


def test_more_than_a_program_can_search_is_refused():
    gradient = torch.ones(1, 32_771, device=DEVICE)
    with pytest.raises(ValueError, match="most must leave a list of at most 16384 entries"):
        kernels.select(gradient, 0.1, 2049)


def gradient_like(num_tokens, vocab, seed=0):
    """(s - t) of two near policies, in bf16, as a workspace holds it."""
    generator = torch.Generator(DEVICE).manual_seed(seed)
    shape = num_tokens, vocab
    student = 4 * torch.randn(shape, device=DEVICE, generator=generator)
    teacher = student + 0.3 * torch.randn(shape, device=DEVICE, generator=generator)
    workspace = torch.full((num_tokens, vocab + 13), torch.nan, dtype=torch.bfloat16, device=DEVICE)
    workspace[:, :vocab] = student.softmax(-1) - teacher.softmax(-1)
    return workspace[:, :vocab]


@pytest.mark.gpu
@pytest.mark.parametrize("vocab", [151_936, 100_279])
@pytest.mark.parametrize("k", [1, 20, 64, 100, 300, 1024])
def test_compiled_top_k(vocab, k):
    logits = torch.randn(257, vocab, device=DEVICE) * 4
    logits[128:] = (logits[128:] * 4).round() / 4  # crowds of equal ones
    logits[5, 1000:] = -torch.inf
    expected = logits.sort(dim=-1, descending=True, stable=True).indices[:, :k]
    assert torch.equal(kernels.top_k(logits, k), expected)
    assert torch.equal(selection.top_k(logits, k), expected)


@pytest.mark.gpu
@pytest.mark.parametrize("vocab", [151_936, 100_279])
@pytest.mark.parametrize("share", [2.0**-9, 0.3])
def test_compiled_select(vocab, share):
    gradient = gradient_like(300, vocab)
    gradient[7] = 0
    gradient[11, 5] = torch.inf
    found, twin = (module.select(gradient, share, 128) for module in (kernels, selection))
    finite = torch.arange(300, device=DEVICE) != 11
    assert found.count[11] == 0
    assert not found.dropped[11] <= share * found.norm[11]
    budget = share * found.norm
    same = (found.columns == twin.columns).all(-1)
    # sums in another order may decide about an entry, where what is dropped is all but the budget
    differs = finite & ~same
    assert ((twin.dropped[differs] / budget[differs] - 1).abs() < 1e-2).all()
    assert same.sum() >= 0.95 * 300
    kept = torch.zeros(300, vocab + 1, dtype=torch.bool, device=DEVICE)
    kept.scatter_(1, found.columns.long(), True)
    rest = gradient.double().masked_fill(kept[:, :vocab], 0)[finite]
    exact = rest.abs().sum(-1)
    assert torch.allclose(found.dropped[finite].double(), exact, rtol=1e-5, atol=0)
    error = (found.dropped_mass[finite].double() - rest.sum(-1)).abs()
    assert (error <= 1e-5 * exact).all()
