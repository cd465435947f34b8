"""Sums over the entries of a sparse gradient, against its dense matrix in float64."""

import pytest
import torch
from closeness import assert_close

from fused_sd.torch_kernels import sparse
from fused_sd.torch_kernels.sparse import SparseValues

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
WIDE = {torch.float64: torch.float64}  # of the others fp32
NUM_TOKENS, VOCAB, SIZE = 9, 23, 5


def make_entries(dtype=torch.float64, dropped_mass=True, vocab=VOCAB):
    """Tokens with none to twelve entries; repeated columns, empty places, columns without any."""
    counts = torch.tensor([3, 0, 12, 1, 0, 7, 7, 2, 0])
    starts = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)])
    columns = torch.randint(0, vocab // 2, (int(starts[-1]),), dtype=torch.int32)
    columns[[1, 15]] = vocab  # empty; the second is the only place of its token
    columns[2], columns[20] = vocab - 1, columns[19]
    values = torch.where(columns == vocab, 0, torch.randn(len(columns)).to(dtype))
    return SparseValues(
        columns, values, starts, torch.randn(len(counts)).to(dtype) if dropped_mass else None
    )


def dense(entries, vocab=VOCAB):
    """The gradient that the entries stand for, without what is dropped_mass: (N, V) in float64."""
    out = torch.zeros(len(entries.starts) - 1, vocab, dtype=torch.float64)
    for token in range(len(out)):
        for at in range(int(entries.starts[token]), int(entries.starts[token + 1])):
            if entries.columns[at] < vocab:
                out[token, int(entries.columns[at])] += float(entries.values[at])
    return out


def operands(dtype):
    """Head, hidden states (both as gathered) and the tokens' factors."""
    wide = WIDE.get(dtype, torch.float32)
    head = torch.randn(VOCAB, SIZE).to(dtype)
    return head, torch.randn(NUM_TOKENS, SIZE).to(dtype), torch.randn(NUM_TOKENS).to(wide)


@pytest.fixture(params=[None, 1, 3], ids=["at once", "one by one", "three by three"])
def pieces(request, monkeypatch):
    """How many rows are gathered at a time."""
    if request.param is not None:
        monkeypatch.setattr(sparse, "GATHERED", request.param * SIZE)


def test_entries_by_column():
    entries = make_entries()
    tokens, order, starts = sparse.by_column(entries, VOCAB)
    counts = entries.starts.diff()
    assert torch.equal(tokens, torch.arange(NUM_TOKENS).repeat_interleave(counts))
    assert starts.shape == (VOCAB + 1,)
    assert starts[0] == 0
    for column in range(VOCAB):
        places = (entries.columns == column).nonzero()[:, 0]  # ascending: by token
        assert torch.equal(order[starts[column] : starts[column + 1]], places)
    assert (entries.columns[order[starts[VOCAB] :]] == VOCAB).all()
    assert len(order) - starts[VOCAB] == 2
    assert torch.equal(order.sort().values, torch.arange(len(order)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_tokens, num_ids", [(9, 4), (1, 7), (9, 1), (0, 4), (9, 0)])
def test_entry_logits(dtype, num_tokens, num_ids, pieces, poisoned_memory):
    head, hidden, _ = operands(dtype)
    hidden, ids = hidden[:num_tokens], torch.randint(0, VOCAB, (num_tokens, num_ids))
    found = sparse.entry_logits(hidden, head, ids)
    wide = WIDE.get(dtype, torch.float32)
    assert found.dtype == wide
    assert_close(found, (hidden.double() @ head.double().T).gather(1, ids), wide)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dropped_mass", [True, False])
def test_gather_sum(dtype, dropped_mass, pieces, poisoned_memory):
    head, _, factor = operands(dtype)
    entries = make_entries(factor.dtype, dropped_mass)
    mean_row = head.to(factor.dtype).mean(0) if dropped_mass else None
    expected = dense(entries) @ head.double()
    if dropped_mass:
        expected += entries.dropped_mass[:, None].double() * mean_row.double()
    expected *= factor[:, None].double()
    head[VOCAB // 2 : -1] = torch.nan  # no entry's column
    found = sparse.gather_sum(entries, head, mean_row, factor, factor.dtype)
    assert_close(found, expected, factor.dtype)
    rounded = sparse.gather_sum(entries, head, mean_row, factor, torch.bfloat16)
    assert torch.equal(rounded, found.bfloat16())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("base", [None, "alone", "scaled"])
def test_segment_sum(dtype, base, pieces, poisoned_memory):
    _, hidden, factor = operands(dtype)
    wide, entries = factor.dtype, make_entries(factor.dtype)
    hidden[[1, 3, 4, 8]] = 0
    expected = (factor[:, None].double() * dense(entries)).T @ hidden.double()
    more = [None, None]
    if base is not None:
        more[0] = torch.randn(VOCAB, SIZE).to(wide)
        more[1] = torch.tensor(-1.5).to(wide) if base == "scaled" else None
        expected += more[0].double() * (-1.5 if base == "scaled" else 1)
    hidden[[1, 3, 4, 8]] = torch.nan  # tokens without entries, one of them with an empty place
    found = sparse.segment_sum(entries, hidden, VOCAB, factor, *more, wide)
    assert_close(found, expected, wide)
    rounded = sparse.segment_sum(entries, hidden, VOCAB, factor, *more, torch.bfloat16)
    assert torch.equal(rounded, found.bfloat16())


def test_operands_may_be_views():
    entries, head, hidden = make_entries(), torch.randn(VOCAB, 2 * SIZE), torch.randn(SIZE, 9)
    head, hidden = head.double()[:, ::2], hidden.double().T
    factor = torch.randn(9, dtype=torch.float64)
    found = sparse.gather_sum(
        entries._replace(dropped_mass=None), head, None, factor, torch.float64
    )
    assert_close(found, factor[:, None] * (dense(entries) @ head), torch.float64)
    found = sparse.segment_sum(entries, hidden, VOCAB, factor, None, None, torch.float64)
    assert_close(found, (factor[:, None] * dense(entries)).T @ hidden, torch.float64)


def test_a_column_of_every_token_is_summed_accurately(monkeypatch):
    """A running sum of so many numbers would lose more of each than its bound allows."""
    monkeypatch.setattr(sparse, "GATHERED", 2**9)
    num = 60_000
    columns, values = torch.zeros(num, dtype=torch.int32), torch.rand(num) + 1
    entries = SparseValues(columns, values, torch.arange(num + 1), None)
    hidden, factor = torch.rand(num, 1) + 1, torch.ones(num)
    found = sparse.segment_sum(entries, hidden, 2, factor, None, None, torch.float32)
    exact = (values.double() * hidden[:, 0].double()).sum()
    assert abs(float(found[0, 0]) / float(exact) - 1) < 1e-6
    assert found[1, 0] == 0


@pytest.mark.parametrize("num_tokens", [0, 4])
def test_no_entries_at_all(num_tokens, poisoned_memory):
    starts = torch.zeros(num_tokens + 1, dtype=torch.int64)
    dropped_mass = torch.ones(num_tokens)
    entries = SparseValues(torch.zeros(0, dtype=torch.int32), torch.zeros(0), starts, dropped_mass)
    head, hidden = torch.randn(VOCAB, SIZE), torch.full((num_tokens, SIZE), torch.nan)
    mean_row, factor = head.mean(0), torch.full((num_tokens,), 2.0)
    assert sparse.by_column(entries, VOCAB).starts.tolist() == [0] * (VOCAB + 1)
    found = sparse.gather_sum(entries, head, mean_row, factor, torch.float32)
    assert torch.equal(found, 2 * mean_row.expand(num_tokens, SIZE))
    found = sparse.segment_sum(entries, hidden, VOCAB, factor, head, None, torch.float32)
    assert torch.equal(found, head)
    found = sparse.segment_sum(entries, hidden, VOCAB, factor, None, None, torch.float32)
    assert torch.equal(found, torch.zeros(VOCAB, SIZE))


@pytest.mark.bits
def test_results_are_the_same_bits_every_time():
    hidden, head = torch.randn(64, 32), torch.randn(501, 32)
    ids, factor = torch.randint(0, 501, (64, 40)), torch.randn(64)
    starts = torch.arange(0, 64 * 40 + 1, 40)
    entries = SparseValues(ids.flatten().int(), torch.randn(64 * 40), starts, torch.randn(64))
    runs = [
        (
            sparse.entry_logits(hidden, head, ids),
            sparse.gather_sum(entries, head, head[0], factor, torch.float32),
            sparse.segment_sum(entries, hidden, 501, factor, None, None, torch.float32),
        )
        for _ in range(3)
    ]
    for again in runs[1:]:
        assert all(torch.equal(*pair) for pair in zip(runs[0], again, strict=True))
