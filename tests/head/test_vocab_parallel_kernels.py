"""Triton's row functions on two ranks that share a head, against PyTorch's on one."""

import pytest
import torch
import vocab_parallel_worker as worker
from closeness import assert_close
from ranks import run
from test_vocab_parallel import definition, joined, on_one_rank

pytest.importorskip("triton")
from fused_sd.kernels import rows

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*encountered in.*:RuntimeWarning"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="interpreted without a GPU"),
]


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What each of two ranks found."""
    return run(worker.kernels_work, 2, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("name", worker.WITH_KERNELS)
def test_a_loss_is_its_definition(found, name):
    whole = joined([found[rank]["checks"][name] for rank in (0, 1)])
    twin = on_one_rank(name, dtype=torch.float32)
    assert whole.keys() == twin.keys()
    for key, value in {**twin, **definition(name)}.items():
        if value.is_floating_point():
            assert_close(whole[key], value, torch.float32, key)
        else:
            assert torch.equal(whole[key], value)


@pytest.mark.parametrize("name", worker.rows_in_shards())
def test_what_ranks_know_of_their_rows_is_joined(found, name):
    sides, _ = worker.rows_in_shards()[name]
    whole = rows.normalizers(*sides)
    mine, theirs = (found[rank]["normalizers"][name] for rank in (0, 1))
    for one, other, expected in zip(mine[:2], theirs[:2], whole[:2], strict=True):
        assert torch.equal(one, other)
        assert_close(one, expected, torch.float32)
    known = slice(0, 5)  # the rest of a state is room
    assert torch.equal(mine.state[:, known], theirs.state[:, known])
    assert_close(mine.state[:, known], whole.state[:, known], torch.float32)
