"""Which entries are chosen, against sorts and against one threshold tried after the other."""

import pytest
import torch
from closeness import TOLERANCE

pytest.importorskip("hypothesis")
from hypothesis import given, settings
from hypothesis import strategies as st

from fused_sd.torch_kernels import sparse
from fused_sd.torch_kernels.selection import has_short_list

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
WIDE = {torch.float64: torch.float64}  # of the others fp32


def by_a_stable_sort(logits, k):
    return logits.sort(dim=-1, descending=True, stable=True).indices[:, :k]


# a prime, whole blocks, one column more and one less, and rows shorter than a block; of each a k
# for which the blocks are a short list, and one for which they are not
@pytest.mark.parametrize("num_columns", [1, 7, 127, 4096, 4097, 4991, 5119])
@pytest.mark.parametrize("k", [1, 7, 130, 4991])
@pytest.mark.parametrize("levels", [2, 40, None])
def test_top_k_is_a_stable_sort(num_columns, k, levels):
    logits = torch.randn(5, num_columns) * 3
    if levels is not None:  # few distinct values: ties within blocks, and at the borders of blocks
        logits = (torch.rand(5, num_columns) * levels).floor() - levels // 2
        logits[1] = 0.0
        logits[2, ::2] = -0.0
    logits[3, -1] = 100.0  # the last of a block that is not whole
    k = min(k, num_columns)
    for rows in (logits, logits.double(), logits[3:4], logits[:0]):
        ids = sparse.top_k(rows, k)
        assert ids.dtype == torch.int64
        assert torch.equal(ids, by_a_stable_sort(rows, k))
        assert torch.equal(rows.gather(1, ids), rows.topk(k).values)


@pytest.mark.parametrize("vocab", [8, 600, 4991])
def test_top_k_finds_no_column_behind_the_vocabulary(vocab):
    logits = torch.full((4, 4999), -torch.inf)
    logits[:, :vocab] = torch.randn(4, vocab)
    logits[1, 3:vocab] = -torch.inf  # fewer finite logits than k: the lowest ids are taken
    logits[2] = -torch.inf
    ids = sparse.top_k(logits, 8)
    assert torch.equal(ids, by_a_stable_sort(logits, 8))
    assert (ids < vocab).all()
    assert ids[2].tolist() == list(range(8))


@pytest.mark.parametrize("num_nan", [1, 5, 900, 4999])
@pytest.mark.parametrize("k", [3, 2000])
def test_nan_among_logits_is_found_and_does_not_harm(num_nan, k):
    logits = (torch.rand(3, 4999) * 20).floor()
    logits[1, torch.randperm(4999)[:num_nan]] = torch.nan
    ids = sparse.top_k(logits, k)
    assert torch.equal(ids[::2], by_a_stable_sort(logits, k)[::2])
    assert logits[1, ids[1]].isnan().sum() == min(k, num_nan)
    assert ((ids >= 0) & (ids < 4999)).all()
    assert ids[1].unique().numel() == k


def defined_selection(row, share, most):
    """Which entries of a float64 row are kept, by trying one threshold after the other."""
    size = row.abs()
    is_candidate = size > 0
    exponent = -200  # below every number here
    while is_candidate.sum() > most:
        is_candidate = size >= 2.0**exponent
        exponent += 1
    thresholds = [torch.inf, *size[is_candidate].unique().flip(0).tolist()]
    for threshold in thresholds:
        is_kept = is_candidate & (size >= threshold)
        if size[~is_kept].sum() <= share * size.sum():
            return is_kept
    return is_candidate


def kept(selection, row, vocab):
    """Which columns of a row are kept, after a look at the places."""
    columns, values = selection.columns[row].long(), selection.values[row]
    count = int(selection.count[row])
    assert (columns[:count].diff() > 0).all()
    assert (columns[:count] < vocab).all()
    assert (columns[count:] == vocab).all()
    assert (values[:count] != 0).all()
    assert (values[count:] == 0).all()
    return torch.zeros(vocab, dtype=torch.bool).index_fill(0, columns[:count], True)


@st.composite
def gradients(draw):
    """Rows with the tails that make a selection err; sums of whole eighths are exact."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    num_rows, vocab = draw(st.integers(1, 3)), draw(st.integers(1, 70))
    kind = draw(st.sampled_from(["whole", "normal", "equal", "geometric", "huge", "tiny", "zero"]))
    noise = torch.randn(num_rows, vocab, generator=generator, dtype=torch.float64)
    sign = noise.sign()
    rows = {
        "whole": noise.round() / 8,
        "normal": noise**5,
        "equal": sign * 0.375,
        "geometric": sign * 2.0 ** -(torch.arange(vocab) % 14),
        "huge": sign * 1e-3 + 1e4 * (torch.arange(vocab) == vocab // 2),
        "tiny": noise * 2.0**-140,  # denormal in fp32, nothing in fp16
        "zero": 0 * noise,
    }
    dtype = draw(st.sampled_from(DTYPES))
    gradient = rows[kind][:, torch.randperm(vocab, generator=generator)].to(dtype)
    share = draw(st.sampled_from([0.0, 2.0**-8, 0.125, 0.5, 1.0]))
    return kind, gradient, share, draw(st.integers(0, 80))


@settings(max_examples=150, deadline=None)
@given(gradients())
def test_the_fewest_entries_are_kept_that_meet_the_budget(drawn):
    kind, gradient, share, most = drawn
    wide = WIDE.get(gradient.dtype, torch.float32)
    exact, slack = gradient.double(), TOLERANCE[wide]
    num_rows, vocab = gradient.shape
    selection = sparse.select(gradient, share, most)
    assert selection.columns.dtype == torch.int32
    assert selection.values.dtype == selection.norm.dtype == selection.dropped.dtype == wide
    assert selection.columns.shape == selection.values.shape == (num_rows, min(most, vocab))
    for row in range(num_rows):
        is_kept, size = kept(selection, row, vocab), exact[row].abs()
        values = selection.values[row, : int(selection.count[row])]
        assert torch.equal(values.double(), exact[row, is_kept])
        assert_sum(selection.norm[row], size, slack)
        assert_sum(selection.dropped[row], size[~is_kept], slack)
        assert_sum(selection.dropped_mass[row], exact[row, ~is_kept], slack)
        if kind in ("whole", "equal", "geometric", "zero"):
            defined = [defined_selection(exact[row], share, most)]
        else:  # the budget is met or missed by a rounding
            shares = share * (1 - slack), share, share * (1 + slack)
            defined = [defined_selection(exact[row], each, most) for each in shares]
        assert any(torch.equal(is_kept, each) for each in defined)


def assert_sum(found, parts, slack):
    """A sum is as accurate as its parts allow: what is dropped is no difference of larger sums."""
    assert abs(float(found) - float(parts.sum())) <= slack * float(parts.abs().sum())


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_long_row_is_selected_as_defined(dtype):
    rows = (torch.randn(6, 9001, dtype=torch.float64) ** 3).to(dtype)
    rows[:4, 300:] *= 1e-5  # whose largest entries meet the budget
    selection = sparse.select(rows, 2**-8, 256)
    is_certified = selection.dropped <= 2**-8 * selection.norm
    assert is_certified.tolist() == [True] * 4 + [False] * 2
    for row in range(6):
        expected = defined_selection(rows[row].double(), 2**-8, 256)
        assert torch.equal(kept(selection, row, 9001), expected)
        assert_sum(selection.dropped[row], rows[row, ~expected].double().abs(), 1e-6)


def test_a_tie_at_the_smallest_kept_entry_is_kept_whole():
    row = torch.tensor([[4.0, 1.0, -1.0, 1.0, 0.5, 0.0, 8.0]])  # norm 15.5
    selection = sparse.select(row, 2 / 15.5, 5)
    assert selection.columns.tolist() == [[0, 1, 2, 3, 6]]
    assert selection.values.tolist() == [[4, 1, -1, 1, 8]]
    assert (selection.count, selection.dropped, selection.dropped_mass) == (5, 0.5, 0.5)
    selection = sparse.select(row, 3.5 / 15.5, 5)
    assert selection.columns.tolist() == [[0, 6, 7, 7, 7]]
    assert (selection.count, selection.dropped, selection.dropped_mass) == (2, 3.5, 1.5)


@pytest.mark.parametrize("scale", [1e-38, 1e-4, 1e4])
def test_a_row_of_few_entries_keeps_them_without_any_loss(scale):
    row = torch.zeros(1, 1009)
    row[0, [3, 700, 1008]] = scale * torch.tensor([1e-3, -1.0, 0.5])
    for most in (3, 4, 1008, 1009, 2000):
        selection = sparse.select(row, 0.0, most)
        assert selection.columns[0, :3].tolist() == [3, 700, 1008]
        assert torch.equal(selection.values[0, :3], row[row != 0])
        assert (selection.count, selection.dropped) == (3, 0)
    assert sparse.select(row, 0.0, 2).dropped > 0


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_a_row_that_is_not_finite_is_within_no_budget(bad, dtype, share):
    rows = torch.randn(4, 1009).to(dtype)
    alone = sparse.select(rows, share, 16)
    rows[1, 500], rows[3, ::7] = bad, bad
    selection = sparse.select(rows, share, 16)
    is_finite = torch.tensor([True, False, True, False])
    assert torch.equal(selection.norm.isfinite(), is_finite)
    assert not (selection.dropped <= share * selection.norm)[~is_finite].any()
    assert (selection.count[~is_finite] == 0).all()
    assert (selection.columns[~is_finite] == 1009).all()
    for mine, others in zip(selection, alone, strict=True):
        assert torch.equal(mine[is_finite], others[is_finite])


def test_a_norm_beyond_the_dtype_is_within_no_budget():
    selection = sparse.select(torch.full((1, 40), 3e38), 1.0, 64)
    assert not selection.dropped <= selection.norm
    assert selection.count == 0


def test_a_gradient_may_be_a_view_with_padding():
    workspace = torch.full((9, 5024), torch.nan, dtype=torch.bfloat16)
    workspace[::2, :5011] = torch.randn(5, 5011).bfloat16() ** 5
    view = workspace[::2, :5011]
    for mine, others in zip(
        sparse.select(view, 0.1, 40), sparse.select(view.clone(), 0.1, 40), strict=True
    ):
        assert torch.equal(mine, others)


@pytest.mark.parametrize("num_rows, most", [(0, 5), (3, 0), (0, 0)])
def test_nothing_to_select(num_rows, most):
    selection = sparse.select(torch.ones(num_rows, 33), 0.5, most)
    assert selection.columns.shape == selection.values.shape == (num_rows, most)
    assert selection.dropped.tolist() == selection.norm.tolist() == [33.0] * num_rows


def test_a_group_is_trimmed_by_one_magnitude_and_written_without_gaps():
    rows = torch.tensor([[4.0, -1.0, 0.5, 8.0], [2.0, 2.0, -3.0, 0.25], [0.5, 0.0, 0.0, -0.75]])
    selection = sparse.select(rows, 0.0, 4)
    is_dense = torch.tensor([False, True, False])
    trimmed = sparse.trim(selection, torch.tensor(1.0), is_dense)
    assert trimmed.values.tolist() == [[4, -1, 0, 8], [0] * 4, [0] * 4]
    assert trimmed.count.tolist() == [3, 0, 0]
    assert trimmed.dropped.tolist() == [0.5, 0, 1.25]
    assert trimmed.dropped_mass.tolist() == [0.5, 0, -0.25]
    assert torch.equal(trimmed.norm, selection.norm)
    assert torch.equal(selection.values[1], rows[1])  # what is trimmed is left as it was
    columns, values = sparse.compact(trimmed, 3)
    assert (columns.tolist(), values.tolist()) == ([0, 1, 3], [4, -1, 8])
    columns, values = sparse.compact(selection, int(selection.count.sum()))
    assert columns.tolist() == [0, 1, 2, 3, 0, 1, 2, 3, 0, 3]
    assert torch.equal(values, rows[rows != 0])


@pytest.mark.bits
def test_a_choice_is_the_same_bits_every_time():
    rows = torch.randn(3, 30_011) ** 5
    runs = [(*sparse.select(rows, 2**-8, 100), sparse.top_k(rows, 50)) for _ in range(3)]
    for again in runs[1:]:
        assert all(torch.equal(*pair) for pair in zip(runs[0], again, strict=True))


def test_few_entries_by_hand():
    """The norm is 16, a share of it may be dropped, and equal magnitudes stay or go together."""
    row = torch.tensor([[0.5, -8.0, 0.0, 2.0, -2.0, 3.0, -0.5]])
    for share, columns, values in [
        (0.0, [0, 1, 3, 4, 5, 6], [0.5, -8.0, 2.0, -2.0, 3.0, -0.5]),
        (1 / 16, [1, 3, 4, 5, 7, 7], [-8.0, 2.0, -2.0, 3.0, 0, 0]),
        (2 / 16, [1, 3, 4, 5, 7, 7], [-8.0, 2.0, -2.0, 3.0, 0, 0]),  # both of 2, or none
        (5 / 16, [1, 5, 7, 7, 7, 7], [-8.0, 3.0, 0, 0, 0, 0]),
        (8 / 16, [1, 7, 7, 7, 7, 7], [-8.0, 0, 0, 0, 0, 0]),
        (1.0, [7] * 6, [0.0] * 6),
    ]:
        found = sparse.select(row, share, 6)
        assert found.columns.tolist() == [columns], share
        assert found.values.tolist() == [values], share
        assert found.count.tolist() == [sum(column < 7 for column in columns)]
        assert found.norm.tolist() == [16.0]
        assert found.dropped.tolist() == [16.0 - sum(map(abs, values))]
        assert found.dropped_mass.tolist() == [-5.0 - sum(values)]


def test_where_more_entries_are_as_large_none_of_them_is_a_candidate():
    """Of five entries between 1 and 2 three may be kept: those from 2 on alone are candidates."""
    row = torch.tensor([[1.5, 1.0, -1.0, 4.0, 1.25, 1.75]])
    found = sparse.select(row, 0.0, 3)
    assert found.columns.tolist() == [[3, 6, 6]]
    assert found.count.tolist() == [1]
    assert found.dropped.tolist() == [6.5]
    assert found.dropped_mass.tolist() == [4.5]


def test_the_columns_behind_a_long_rows_last_are_not_among_its_largest():
    """A block of 128 columns that a row does not fill is searched as far as the row goes."""
    width = 1030
    assert has_short_list(2, width)
    row = torch.arange(float(width))[None]
    assert sparse.top_k(row, 2).tolist() == [[width - 1, width - 2]]
    assert sparse.top_k(-row, 2).tolist() == [[0, 1]]
    assert sparse.top_k(row * 0, 2).tolist() == [[0, 1]]
    peak = torch.zeros(1, width)
    peak[0, -1] = 1
    assert sparse.top_k(peak, 2).tolist() == [[width - 1, 0]]
