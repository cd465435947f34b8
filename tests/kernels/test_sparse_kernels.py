"""``kernels/sparse.py`` against brute force in float64; interpreted without a GPU."""

import contextlib

import pytest
import torch
from waits import no_waits

pytest.importorskip("triton")
from fused_sd.kernels import sparse as kernels
from fused_sd.torch_kernels import sparse

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
pytestmark = [
    pytest.mark.kernels,
    # the interpreter computes both branches of a select in numpy, which warns of inf - inf
    pytest.mark.filterwarnings("ignore:.*encountered in.*:RuntimeWarning"),
]


def head(num_tokens, vocab, hidden_size, dtype):
    hidden = torch.randn(num_tokens, hidden_size, device=DEVICE).to(dtype)
    return hidden, torch.randn(vocab, hidden_size, device=DEVICE).to(dtype)


def assert_sums_close(found, exact, sizes):
    """Assert that a sum is off by fp32 rounding and one rounding to its dtype at most."""
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


def make_entries(counts, vocab, dropped_mass=True):
    """SparseValues of tokens, ascending in each, with an empty place behind every third token's."""
    columns, starts = [], [0]
    for token, count in enumerate(counts):
        columns += torch.randperm(vocab)[:count].sort().values.tolist()
        columns += [vocab] * (token % 3 == 0)
        starts.append(len(columns))
    columns = torch.tensor(columns, dtype=torch.int32, device=DEVICE)
    values = torch.where(columns < vocab, torch.randn(len(columns), device=DEVICE), 0)
    starts = torch.tensor(starts, device=DEVICE)
    return sparse.SparseValues(
        columns, values, starts, torch.randn(len(counts), device=DEVICE) if dropped_mass else None
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
@pytest.mark.parametrize("dropped_mass", [False, True])
def test_gather_sum(dtype, dropped_mass):
    vocab, counts = 101, [0, 5, 1, 17, 0, 30]
    for hidden_size, out in ((8, torch.float32), (67, dtype)):
        _, weight = head(1, vocab, hidden_size, dtype)
        entries = make_entries(counts, vocab, dropped_mass)
        mean_row = weight.float().mean(0) if dropped_mass else None
        factor = torch.randn(len(counts), device=DEVICE)
        matrix = factor.double()[:, None] * dense(entries, vocab)
        exact, sizes = matrix @ weight.double(), matrix.abs() @ weight.double().abs()
        if dropped_mass:
            exact += (factor * entries.dropped_mass).double()[:, None] * mean_row.double()
            sizes += (factor * entries.dropped_mass).double().abs()[
                :, None
            ] * mean_row.double().abs()
        found = kernels.gather_sum(entries, weight, mean_row, factor, out)
        assert found.dtype == out
        assert_sums_close(found, exact, sizes)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("extras", [(), ("base",), ("base", "factor")])
def test_segment_sum(dtype, extras):
    vocab, counts = 17, [0, 5, 1, 17, 0, 9]
    for hidden_size, out in ((8, torch.float32), (67, dtype)):
        hidden, _ = head(len(counts), 1, hidden_size, dtype)
        hidden[[0, 4]] = torch.nan  # tokens without entries, one of which has an empty place
        entries = make_entries(counts, vocab)
        factor = torch.randn(len(counts), device=DEVICE)
        base = torch.randn(vocab, hidden_size, device=DEVICE) if "base" in extras else None
        base_factor = torch.tensor(0.7, device=DEVICE) if "factor" in extras else None
        matrix = factor.double()[:, None] * dense(entries, vocab)
        states = hidden.double().nan_to_num(0)
        exact, sizes = matrix.T @ states, matrix.T.abs() @ states.abs()
        if base is not None:
            scaled = base.double() * (1 if base_factor is None else base_factor.double())
            exact, sizes = exact + scaled, sizes + scaled.abs()
        others = base, base_factor
        found = kernels.segment_sum(entries, hidden, vocab, factor, *others, out)
        assert found.dtype == out
        assert_sums_close(found, exact, sizes)


def test_a_column_that_every_token_names():
    """A long column is summed by the second launch, in the same order every time."""
    num_tokens, vocab = kernels.LONG + 201, 5
    hidden, _ = head(num_tokens, 1, 67, torch.bfloat16)
    columns = torch.tensor([[1, 3]], dtype=torch.int32, device=DEVICE).repeat(num_tokens, 1)
    columns[kernels.LONG :, 1] = 4  # the most entries of a column that is not long
    values = torch.randn(num_tokens, 2, device=DEVICE)
    starts = torch.arange(0, 2 * num_tokens + 1, 2, device=DEVICE)
    entries = sparse.SparseValues(columns.flatten(), values.flatten(), starts, None)
    factor = torch.randn(num_tokens, device=DEVICE)
    matrix = factor.double()[:, None] * dense(entries, vocab)
    arguments = entries, hidden, vocab, factor, None, None, torch.float32
    found = kernels.segment_sum(*arguments)
    sizes = matrix.T.abs() @ hidden.double().abs()
    assert_sums_close(found, matrix.T @ hidden.double(), sizes)
    assert (found[[0, 2]] == 0).all()
    assert torch.equal(kernels.segment_sum(*arguments), found)


def test_every_result_is_the_same_bit_for_bit(poisoned_memory):
    """Results are equal from run to run, whatever lies in fresh memory."""
    vocab = 31
    gradient = torch.randn(3, vocab, device=DEVICE).bfloat16()
    hidden, weight = head(3, vocab, 67, torch.bfloat16)
    factor = torch.ones(3, device=DEVICE)

    def run():
        ids = kernels.top_k(gradient.float(), 10)
        chosen = kernels.select(gradient, 0.2, 16)
        starts = torch.arange(0, 3 * 16 + 1, 16, device=DEVICE)
        entries = sparse.SparseValues(
            chosen.columns.flatten(), chosen.values.flatten(), starts, chosen.dropped_mass
        )
        mean = weight.float().mean(0)
        dhidden = kernels.gather_sum(entries, weight, mean, factor, torch.bfloat16)
        sums = entries, hidden, vocab, factor, None, None, torch.bfloat16
        dweight = kernels.segment_sum(*sums)
        return ids, *chosen, kernels.entry_logits(hidden, weight, ids), dhidden, dweight

    for one, other in zip(run(), run(), strict=True):
        assert torch.equal(one, other)
        assert not one.isnan().any()


def test_nothing_to_do():
    hidden, weight = head(0, 11, 8, torch.bfloat16)
    few = torch.zeros(0, dtype=torch.float32, device=DEVICE)
    entries = sparse.SparseValues(
        few.int(), few, torch.zeros(1, dtype=torch.int64, device=DEVICE), few
    )
    mean = torch.ones(8, device=DEVICE)
    assert kernels.top_k(torch.empty(0, 11, device=DEVICE), 3).shape == (0, 3)
    chosen = kernels.select(torch.empty(0, 11, dtype=torch.bfloat16, device=DEVICE), 0.1, 4)
    assert chosen.columns.shape == chosen.values.shape == (0, 4)
    assert all(value.shape == (0,) for value in chosen[2:])
    ids = torch.zeros(0, 4, dtype=torch.int64, device=DEVICE)
    assert kernels.entry_logits(hidden, weight, ids).shape == (0, 4)
    assert kernels.entry_logits(weight, weight, ids.reshape(11, 0)).shape == (11, 0)
    assert kernels.gather_sum(entries, weight, mean, few, torch.bfloat16).shape == (0, 8)
    found = kernels.segment_sum(entries, hidden, 11, few, None, None, torch.bfloat16)
    assert torch.equal(found, torch.zeros_like(weight))


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
    dropped_mass = torch.randn(num_tokens, device=DEVICE)
    entries = sparse.SparseValues(ids.int().flatten(), values.flatten(), starts, dropped_mass)
    factor = torch.randn(num_tokens, device=DEVICE)
    matrix = torch.zeros(num_tokens, vocab + 1, dtype=torch.float64, device=DEVICE)
    matrix = matrix.scatter_(1, ids, values.double())[:, :vocab] * factor.double()[:, None]
    mean, states = weight.float().mean(0), hidden.double().nan_to_num(0)
    found = kernels.gather_sum(entries, weight, mean, factor, dtype)
    exact = matrix @ weight.double() + (factor * dropped_mass).double()[:, None] * mean.double()
    sizes = matrix.abs() @ weight.double().abs() + exact.abs()
    assert_sums_close(found, exact, sizes)
    base = torch.randn(vocab, hidden_size, device=DEVICE)
    scale = torch.tensor(0.7, device=DEVICE)
    arguments = entries, hidden, vocab, factor, base, scale, dtype
    found = kernels.segment_sum(*arguments)
    exact = matrix.T @ states + scale.double() * base.double()
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
    gradient = torch.randn(64, 32_003, device=DEVICE).bfloat16()
    hidden, weight = head(64, 32_003, 256, torch.bfloat16)
    factor = torch.ones(64, device=DEVICE)
    starts = torch.arange(0, 64 * 128 + 1, 128, device=DEVICE)

    def run():
        ids = kernels.top_k(gradient.float(), 20)
        kernels.entry_logits(hidden, weight, ids)
        chosen = kernels.select(gradient, 0.01, 128)
        given = chosen.columns.flatten(), chosen.values.flatten(), starts, chosen.dropped_mass
        entries = sparse.SparseValues(*given)
        mean = weight.float().mean(0)
        kernels.gather_sum(entries, weight, mean, factor, torch.bfloat16)
        kernels.segment_sum(entries, hidden, 32_003, factor, None, None, torch.bfloat16)

    run()
    with no_waits():
        run()
