"""Triton's work on chosen entries against brute force in float64; interpreted without a GPU."""

import contextlib

import pytest
import torch

pytest.importorskip("triton")
from fused_sd import selection, sparse
from fused_sd.kernels import sparse as kernels

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
PRIME = 4201  # columns: over 32 blocks of 128, and one of 105
pytestmark = [
    # the interpreter computes both branches of a select in numpy, which warns of inf - inf
    pytest.mark.filterwarnings("ignore:.*encountered in.*:RuntimeWarning"),
]


def brute_top_k(logits, k):
    """By a sort of pairs: largest first, then by id."""
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
    """Row by row, from the definition, in float64: the kept columns, and what else they tell."""
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
    for row, (kept, norm, dropped, spread) in enumerate(exact):
        count = int(found.count[row])
        assert found.columns[row, :count].tolist() == kept
        assert (found.columns[row, count:] == vocab).all()
        assert torch.equal(found.values[row, :count], gradient[row, kept].float())
        assert (found.values[row, count:] == 0).all()
        tiny = 1e-44
        assert abs(float(found.norm[row]) - norm) <= 1e-6 * norm + tiny
        assert abs(float(found.dropped[row]) - dropped) <= 1e-6 * dropped + tiny
        assert abs(float(found.spread[row]) - spread) <= 1e-6 * dropped + tiny
        if abs(dropped - share * norm) > 1e-5 * norm or dropped == 0:
            assert bool(found.dropped[row] <= share * found.norm[row]) == (dropped <= share * norm)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("share, most", [(0.01, 13), (0.3, 16)])
def test_select(share, most, dtype):
    gradient = one_row_of_each([*KINDS, "alternating"], 1009, dtype)
    check_selection(kernels.select(gradient, share, most), gradient, share, most)


@pytest.mark.parametrize("share", [0.0, 0.004, 0.5, 1.5])
@pytest.mark.parametrize("most", [1, 16, 509, 1000])
def test_select_keeps_as_few_as_the_budget_allows(share, most):
    gradient = rows_of("heavy", 509, torch.bfloat16)[:1]
    check_selection(kernels.select(gradient, share, most), gradient, share, most)


def test_entries_that_are_equal_are_kept_together():
    gradient = torch.zeros(1, 300, device=DEVICE)
    gradient[0, [7, 130, 131, 290]] = torch.tensor([4.0, -1.0, 1.0, 1.0], device=DEVICE)
    # of a norm of 7 two ones could go, but then the third, equal to them, is kept with them
    found = kernels.select(gradient, 0.3, 16)
    assert found.columns[0, :5].tolist() == [7, 130, 131, 290, 300]
    assert found.dropped[0] == 0
    found = kernels.select(gradient, 3 / 7 + 1e-6, 16)
    assert found.columns[0, :2].tolist() == [7, 300]
    assert (found.dropped[0], found.spread[0]) == (3, 1)


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


def test_more_than_a_program_can_search_is_refused():
    gradient = torch.ones(1, 32_771, device=DEVICE)
    with pytest.raises(ValueError, match="most must leave a list of at most 16384 entries"):
        kernels.select(gradient, 0.1, 2049)


def head(num_tokens, vocab, hidden_size, dtype):
    hidden = torch.randn(num_tokens, hidden_size, device=DEVICE).to(dtype)
    return hidden, torch.randn(vocab, hidden_size, device=DEVICE).to(dtype)


def assert_sums_close(found, exact, sizes):
    """Within fp32 sums' rounding, and one rounding to the result's dtype."""
    rounding = {torch.float32: 0.0, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}[found.dtype]
    bound = 2e-6 * sizes + rounding * exact.abs() + 1e-7
    assert ((found.double() - exact).abs() <= bound).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("hidden_size", [8, 67, 300])
def test_entry_logits(dtype, hidden_size):
    hidden, weight = head(3, 101, hidden_size, dtype)
    ids = torch.randint(101, (3, 19), device=DEVICE)
    found = kernels.entry_logits(hidden, weight, ids)
    assert found.dtype == torch.float32
    exact = (hidden.double()[:, None] * weight.double()[ids]).sum(-1)
    sizes = (hidden.double()[:, None] * weight.double()[ids]).abs().sum(-1)
    assert_sums_close(found, exact, sizes)
    # neither its place nor its neighbours change a product
    alone = kernels.entry_logits(hidden, weight, ids[:, 11:12])
    assert torch.equal(found[:, 11:12], alone)
    assert torch.equal(kernels.entry_logits(hidden, weight.T.contiguous().T, ids), found)


def make_entries(counts, vocab, spread=True):
    """Entries of tokens, ascending in each, with an empty place behind every third token's."""
    columns, starts = [], [0]
    for token, count in enumerate(counts):
        columns += torch.randperm(vocab)[:count].sort().values.tolist()
        columns += [vocab] * (token % 3 == 0)
        starts.append(len(columns))
    columns = torch.tensor(columns, dtype=torch.int32, device=DEVICE)
    values = torch.where(columns < vocab, torch.randn(len(columns), device=DEVICE), 0)
    starts = torch.tensor(starts, device=DEVICE)
    return sparse.Entries(
        columns, values, starts, torch.randn(len(counts), device=DEVICE) if spread else None
    )


def dense(entries, vocab, dtype=torch.float64):
    """The entries' gradient (N, V) of one token a row."""
    num_tokens = entries.starts.shape[0] - 1
    out = torch.zeros(num_tokens, vocab + 1, dtype=dtype, device=DEVICE)
    for token in range(num_tokens):
        at = slice(int(entries.starts[token]), int(entries.starts[token + 1]))
        columns = entries.columns[at].long()
        out[token].index_add_(0, columns, entries.values[at].to(dtype))
    return out[:, :vocab]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("spread", [False, True])
def test_gather_sum(dtype, spread):
    vocab, counts = 101, [0, 5, 1, 17, 0, 30]
    for hidden_size in (8, 67):
        _, weight = head(1, vocab, hidden_size, dtype)
        entries = make_entries(counts, vocab, spread)
        mean_row = weight.float().mean(0) if spread else None
        factor = torch.randn(len(counts), device=DEVICE)
        matrix = factor.double()[:, None] * dense(entries, vocab)
        exact, sizes = matrix @ weight.double(), matrix.abs() @ weight.double().abs()
        if spread:
            exact += (factor * entries.spread).double()[:, None] * mean_row.double()
            sizes += (factor * entries.spread).double().abs()[:, None] * mean_row.double().abs()
        for out in (dtype, torch.float32):
            found = kernels.gather_sum(entries, weight, mean_row, factor, out)
            assert found.dtype == out
            assert_sums_close(found, exact, sizes)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("extras", [(), ("base",), ("background", "base", "factor")])
def test_segment_sum(dtype, extras):
    vocab, counts = 17, [0, 5, 1, 17, 0, 9]
    for hidden_size in (8, 67):
        hidden, _ = head(len(counts), 1, hidden_size, dtype)
        hidden[[0, 4]] = torch.nan  # tokens without entries, one of which has an empty place
        entries = make_entries(counts, vocab)
        factor = torch.randn(len(counts), device=DEVICE)
        background = torch.randn(hidden_size, device=DEVICE) if "background" in extras else None
        base = torch.randn(vocab, hidden_size, device=DEVICE) if "base" in extras else None
        base_factor = torch.tensor(0.7, device=DEVICE) if "factor" in extras else None
        matrix = factor.double()[:, None] * dense(entries, vocab)
        states = hidden.double().nan_to_num(0)
        exact, sizes = matrix.T @ states, matrix.T.abs() @ states.abs()
        if background is not None:
            exact, sizes = exact + background.double(), sizes + background.double().abs()
        if base is not None:
            scaled = base.double() * (1 if base_factor is None else base_factor.double())
            exact, sizes = exact + scaled, sizes + scaled.abs()
        others = background, base, base_factor
        for out in (dtype, torch.float32):
            found = kernels.segment_sum(entries, hidden, vocab, factor, *others, out)
            assert found.dtype == out
            assert_sums_close(found, exact, sizes)


def test_a_column_that_every_token_names():
    """Its segment is summed by programs of its own, in the same order every time."""
    num_tokens, vocab = kernels.LONG + 201, 5
    hidden, _ = head(num_tokens, 1, 67, torch.bfloat16)
    columns = torch.tensor([[1, 3]], dtype=torch.int32, device=DEVICE).repeat(num_tokens, 1)
    columns[kernels.LONG :, 1] = 4  # exactly as many as one program sums
    values = torch.randn(num_tokens, 2, device=DEVICE)
    starts = torch.arange(0, 2 * num_tokens + 1, 2, device=DEVICE)
    entries = sparse.Entries(columns.flatten(), values.flatten(), starts, None)
    factor = torch.randn(num_tokens, device=DEVICE)
    matrix = factor.double()[:, None] * dense(entries, vocab)
    arguments = entries, hidden, vocab, factor, None, None, None, torch.float32
    found = kernels.segment_sum(*arguments)
    sizes = matrix.T.abs() @ hidden.double().abs()
    assert_sums_close(found, matrix.T @ hidden.double(), sizes)
    assert (found[[0, 2]] == 0).all()
    assert torch.equal(kernels.segment_sum(*arguments), found)


def test_every_result_is_the_same_bit_for_bit(poisoned_memory):
    """Run to run, and whatever lies in fresh memory."""
    vocab = 61
    gradient = rows_of("heavy", vocab, torch.bfloat16)
    hidden, weight = head(3, vocab, 67, torch.bfloat16)
    factor = torch.ones(3, device=DEVICE)

    def run():
        ids = kernels.top_k(gradient.float(), 10)
        chosen = kernels.select(gradient, 0.2, 16)
        starts = torch.arange(0, 3 * 16 + 1, 16, device=DEVICE)
        entries = sparse.Entries(
            chosen.columns.flatten(), chosen.values.flatten(), starts, chosen.spread
        )
        mean = weight.float().mean(0)
        dhidden = kernels.gather_sum(entries, weight, mean, factor, torch.bfloat16)
        sums = entries, hidden, vocab, factor, mean, None, None, torch.bfloat16
        dweight = kernels.segment_sum(*sums)
        return ids, *chosen, kernels.entry_logits(hidden, weight, ids), dhidden, dweight

    for one, other in zip(run(), run(), strict=True):
        assert torch.equal(one, other)
        assert not one.isnan().any()


def test_nothing_to_do():
    hidden, weight = head(0, 11, 8, torch.bfloat16)
    few = torch.zeros(0, dtype=torch.float32, device=DEVICE)
    entries = sparse.Entries(few.int(), few, torch.zeros(1, dtype=torch.int64, device=DEVICE), few)
    mean = torch.ones(8, device=DEVICE)
    assert kernels.top_k(torch.empty(0, 11, device=DEVICE), 3).shape == (0, 3)
    chosen = kernels.select(torch.empty(0, 11, dtype=torch.bfloat16, device=DEVICE), 0.1, 4)
    assert chosen.columns.shape == chosen.values.shape == (0, 4)
    assert all(value.shape == (0,) for value in chosen[2:])
    ids = torch.zeros(0, 4, dtype=torch.int64, device=DEVICE)
    assert kernels.entry_logits(hidden, weight, ids).shape == (0, 4)
    assert kernels.entry_logits(weight, weight, ids.reshape(11, 0)).shape == (11, 0)
    assert kernels.gather_sum(entries, weight, mean, few, torch.bfloat16).shape == (0, 8)
    found = kernels.segment_sum(entries, hidden, 11, few, mean, None, None, torch.bfloat16)
    assert torch.equal(found, torch.ones_like(weight))


def test_programs_are_launched_on_the_gpu_that_holds_the_data(monkeypatch):
    entered = []

    @contextlib.contextmanager
    def device_of(tensor):
        entered.append(tensor)
        yield

    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    kernels.select(torch.ones(2, 11, device=DEVICE), 0.1, 4)
    kernels.entry_logits(*head(2, 11, 8, torch.float32), torch.zeros(2, 1, dtype=torch.int64))
    assert len(entered) == 4


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
    error = (found.spread[finite].double() - rest.sum(-1)).abs()
    assert (error <= 1e-5 * exact).all()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_compiled_sums(dtype):
    """Against dense products in float64; the first column is named by every token."""
    num_tokens, vocab, hidden_size, kept = 2000, 32_003, 1000, 20
    hidden, weight = head(num_tokens, vocab, hidden_size, dtype)
    ids = 1 + torch.rand(num_tokens, vocab - 1, device=DEVICE).topk(kept - 1).indices
    ids = torch.cat([torch.zeros_like(ids[:, :1]), ids], -1).sort(-1).values
    values = torch.randn(num_tokens, kept, device=DEVICE)
    hidden[3] = torch.nan
    ids[3], values[3] = vocab, 0
    starts = torch.arange(0, num_tokens * kept + 1, kept, device=DEVICE)
    spread = torch.randn(num_tokens, device=DEVICE)
    entries = sparse.Entries(ids.int().flatten(), values.flatten(), starts, spread)
    factor = torch.randn(num_tokens, device=DEVICE)
    matrix = torch.zeros(num_tokens, vocab + 1, dtype=torch.float64, device=DEVICE)
    matrix = matrix.scatter_(1, ids, values.double())[:, :vocab] * factor.double()[:, None]
    mean, states = weight.float().mean(0), hidden.double().nan_to_num(0)
    found = kernels.gather_sum(entries, weight, mean, factor, dtype)
    exact = matrix @ weight.double() + (factor * spread).double()[:, None] * mean.double()
    sizes = matrix.abs() @ weight.double().abs() + exact.abs()
    assert_sums_close(found, exact, sizes)
    base = torch.randn(vocab, hidden_size, device=DEVICE)
    scale = torch.tensor(0.7, device=DEVICE)
    arguments = entries, hidden, vocab, factor, mean, base, scale, dtype
    found = kernels.segment_sum(*arguments)
    exact = matrix.T @ states + mean.double() + scale.double() * base.double()
    sizes = matrix.T.abs() @ states.abs() + mean.double().abs() + base.double().abs()
    assert_sums_close(found, exact, sizes)
    assert torch.equal(kernels.segment_sum(*arguments), found)
    ids[3] = 0
    found = kernels.entry_logits(hidden, weight, ids)
    products = hidden.double()[:100, None] * weight.double()[ids[:100]]
    finite = torch.arange(100, device=DEVICE) != 3
    sizes = products.abs().sum(-1)
    assert_sums_close(found[:100][finite], products.sum(-1)[finite], sizes[finite])


@pytest.mark.gpu
def test_nothing_waits_for_the_gpu():
    gradient = gradient_like(64, 32_003)
    hidden, weight = head(64, 32_003, 256, torch.bfloat16)
    factor = torch.ones(64, device=DEVICE)
    starts = torch.arange(0, 64 * 128 + 1, 128, device=DEVICE)

    def run():
        ids = kernels.top_k(gradient.float(), 20)
        kernels.entry_logits(hidden, weight, ids)
        chosen = kernels.select(gradient, 0.01, 128)
        given = chosen.columns.flatten(), chosen.values.flatten(), starts, chosen.spread
        entries = sparse.Entries(*given)
        mean = weight.float().mean(0)
        kernels.gather_sum(entries, weight, mean, factor, torch.bfloat16)
        kernels.segment_sum(entries, hidden, 32_003, factor, mean, None, None, torch.bfloat16)

    run()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
