"""A head that lies on several ranks: each loss is what it is on one, and its definition.

Four processes, started once, compute everything; see ``vocab_parallel_worker.py``.
"""

import functools

import pytest
import torch
import vocab_parallel_worker as worker
from closeness import TOLERANCE, assert_close, errors
from ranks import run
from vocab_parallel_cases import outcome, truth
from vocab_parallel_checks import CHECKS

from fused_sd import LMHead
from fused_sd.planning import objectives, wire, workload

LAYOUTS = worker.LAYOUTS
each_again = pytest.mark.parametrize("name", worker.AGAIN)


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What each rank found."""
    return run(worker.work, worker.NUM_RANKS, tmp_path_factory.mktemp("ranks"))


@functools.cache
def definition(name, vocab=41):
    return truth(CHECKS[name], vocab)


@functools.cache
def on_one_rank(name, vocab=41, dtype=torch.float64):
    check = CHECKS[name]
    case = check.case(vocab, dtype)
    valid = check.teacher_valid or case.valid_vocab
    teacher = LMHead(case.teacher_weight, None, case.logit_scale, case.softcap, valid)
    return outcome(check, case, case.head, teacher)


def joined(parts):
    """One outcome of the ranks': they say the same, and each has its rows of the head."""
    first, *others = parts
    for other in others:
        assert other.keys() == first.keys()
        for key in first.keys() - {"dweight", "dbias"}:
            assert torch.equal(first[key], other[key]), f"{key} differs between ranks"
    rows = {
        key: torch.cat([part[key] for part in parts])
        for key in ("dweight", "dbias")
        if key in first
    }
    return {**first, **rows}


def assert_equal_outcomes(one, other, dtype=torch.float64):
    assert one.keys() >= other.keys()
    for key, value in other.items():
        if value.is_floating_point():
            assert_close(one[key], value, dtype, key)
        else:
            assert torch.equal(one[key], value), key


@pytest.mark.bits
@pytest.mark.parametrize(
    "layout, name", [(layout, name) for layout, names in worker.ON.items() for name in names]
)
def test_a_loss_is_its_definition(found, layout, name):
    vocab = LAYOUTS[layout].vocab
    whole = joined([found[rank][layout][name] for rank in LAYOUTS[layout].ranks])
    assert_equal_outcomes(whole, definition(name, vocab))
    assert_equal_outcomes(whole, on_one_rank(name, vocab))


@pytest.mark.bits
@each_again
def test_it_repeats_to_the_bit_and_goes_back_twice(found, name):
    for rank in LAYOUTS["two ranks"].ranks:
        first, second = found[rank]["two ranks"][name], found[rank]["again"][name]
        assert first.keys() == second.keys()
        assert all(torch.equal(first[key], second[key]) for key in first)


@each_again
def test_the_ranks_parts_of_the_hidden_gradient_add_up(found, name):
    parts = [found[rank]["in parts"][name] for rank in LAYOUTS["two ranks"].ranks]
    assert not torch.equal(parts[0]["dhidden"], parts[1]["dhidden"])
    whole = sum(part["dhidden"] for part in parts)
    assert_equal_outcomes(joined([{**part, "dhidden": whole} for part in parts]), definition(name))


@pytest.mark.bits
@each_again
def test_a_group_of_one_rank_is_no_group(found, name):
    for rank in range(worker.NUM_RANKS):
        for key, value in on_one_rank(name).items():
            assert torch.equal(found[rank]["alone"][name][key], value)


@pytest.mark.parametrize("dtype", worker.DTYPES)
@pytest.mark.parametrize("name", worker.PRECISE)
def test_rounding_is_no_coarser_than_on_one_rank(found, name, dtype):
    whole = joined([found[rank]["precise"][name, dtype] for rank in (0, 1)])
    alone, exact = on_one_rank(name, dtype=worker.DTYPES[dtype]), definition(name)
    for key, value in exact.items():
        assert whole[key].dtype == alone[key].dtype
        ours, theirs = errors(whole[key], value), errors(alone[key], value)
        assert all(a <= 1.5 * b + 2e-6 for a, b in zip(ours, theirs, strict=True)), (key, ours)


@pytest.mark.bits
@pytest.mark.parametrize("key", worker.EQUAL, ids="-".join)
def test_a_teacher_that_equals_the_student_says_exactly_nothing(found, key):
    for rank in (0, 1):
        outcome = found[rank]["equal"][key]
        assert outcome.keys() == {"loss", "token_loss", "dhidden", "dweight", "dbias"}
        assert not any(value.any() for value in outcome.values())


def test_without_a_gradient_only_the_loss_is_spoken_of(found):
    for rank in (0, 1):
        requires_grad, loss, said = found[rank]["without grad"]
        assert not requires_grad
        assert_close(loss, definition("full jsd")["loss"], torch.float64)
        # two normalisers' maxima, their sums, and the loss, of 5 tokens
        assert said == {"count": 3, "MAX": 5 * 2 * 8, "SUM": 5 * 3 * 8}


@pytest.mark.bits
@pytest.mark.parametrize("valid", [None, 23])
@pytest.mark.parametrize("tolerance", [2**-4, 0.2])
@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_a_sparse_gradient_keeps_its_tolerance_over_all_ranks(found, reduction, tolerance, valid):
    sparse = [found[rank]["sparse"][reduction, tolerance, valid] for rank in (0, 1)]
    dense = [found[rank]["sparse"][reduction, None, valid] for rank in (0, 1)]
    for key in ("loss", "dhidden"):
        assert torch.equal(sparse[0][key], sparse[1][key])
    # of no rows the ranks disagree; one with padding alone has no gradient that could be dense
    assert torch.equal(sparse[1]["dense"], sparse[0]["dense"] & (valid is None))
    assert sparse[0]["dense"].any()
    assert sparse[0]["kept"].any()
    factors = worker.SPARSE_WEIGHTS if reduction == "none" else (worker.SPARSE_WEIGHTS != 0)
    norm = dense[0]["dhidden"].abs().sum(-1)  # the head is the identity
    assert_close(factors * sum(part["norm"] for part in sparse), norm, torch.float64)
    dropped = factors * sum(part["dropped"] for part in sparse)
    missing = (sparse[0]["dhidden"] - dense[0]["dhidden"]).abs().sum(-1)
    assert missing.any()
    assert (missing <= 2 * dropped + TOLERANCE[torch.float64]).all()
    if reduction == "none":
        assert (dropped <= tolerance * norm).all()
    assert dropped.sum() <= tolerance * norm.sum()
    assert not missing[sparse[0]["dense"]].any()


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_ranks_decide_alike_which_rows_an_automatic_gradient_searches(found, reduction):
    """The first chunk is flat, so that the second is dense unsearched; the third is sparse."""
    auto = [found[rank]["sparse"]["auto", reduction, 2**-4] for rank in (0, 1)]
    dense = [found[rank]["sparse"]["auto", reduction, None] for rank in (0, 1)]
    for part in auto:
        assert part["dense"].tolist() == [True] * 4 + [False] + [True] * 2 + [False] * 2
        assert (part["norm"] != 0).tolist() == (worker.SPARSE_WEIGHTS != 0).tolist()
    assert torch.equal(auto[0]["dhidden"], auto[1]["dhidden"])
    is_dense = auto[0]["dense"]
    expected = dense[0]["dhidden"]
    assert_close(auto[0]["dhidden"][is_dense], expected[is_dense], torch.float64)
    missing = (auto[0]["dhidden"] - expected)[~is_dense].abs().sum()
    assert 0 < missing <= 2**-4 * 2 * expected.abs().sum()
    for part, whole in zip(auto, dense, strict=True):
        assert (part["dweight"] - whole["dweight"]).norm() <= 2**-4 * whole["dweight"].norm()


def planned(name):
    """What a plan says of a check."""
    how = dict(worker.WIRED[name])
    has_teacher = how.pop("has_teacher", "entries" not in name)
    objective = objectives.PlannedObjective(name, has_teacher=has_teacher, **how)
    work = workload.Workload(
        tokens=7,
        active=5 - (name == "rlsd"),  # one of its advantages is 0
        hidden_size=12,
        vocab=23,
        teacher_hidden_size=12,
        teacher_vocab=23,
        element=4,
        objective=objective,
        trained="frozen head" not in name,
        reduced="each token" not in name,
        kind="cpu",
        shared_head=False,
        free_bytes=2**30,
        chunk_size=3,
        tensor_parallel=2,
    )
    return wire.traffic(work)


@pytest.mark.parametrize("name", worker.WIRED)
def test_what_is_said_is_what_a_plan_says(found, name):
    said, plan = found[0]["wire"][name, 46], planned(name)
    expected = {"count": plan.num_collectives, **plan.payload}
    expected["SUM"] += expected.pop("SUM of dH")
    assert said == {key: value for key, value in expected.items() if value}


@pytest.mark.parametrize("name", worker.WIRED)
def test_twice_the_vocabulary_says_no_more(found, name):
    for rank in (0, 1):
        assert found[rank]["wire"][name, 92] == found[0]["wire"][name, 46]


REFUSALS = {
    "too many sizes": "shard_sizes must list the rows of 2 ranks",
    "another size": "shard_sizes must list the rows of 2 ranks",
    "nobody was told the sizes": r"shard_sizes=\(23, 18\)\) on every rank",
    "only the teacher's differ": r"shard_sizes=\(20, 21\)\) on every rank",
    "sizes without a group": "process_group must come with a head that has shard_sizes",
    "sizes without a group, log-probs": "process_group must come with",
    "teacher cut elsewhere": "teacher_head must be cut between the ranks where the student's",
    "nothing: sizes in a list": "^nothing$",
    "the group's name": "process_group must be a torch.distributed.ProcessGroup",
    "the group's name, log-probs": "process_group must be a torch.distributed.ProcessGroup",
    "a group of others": "process_group must be a torch.distributed.ProcessGroup that this rank",
    "a DTensor": "student_head must be a plain tensor, got a DTensor",
    "more entries than there are": "StudentTopK",
    "more log-probs than there are": "entries",
    "an id behind the last": r"token_ids must lie in \[0, 41\)",
    "more tokens than rows": "valid_vocab must be an integer from 1 to V = 41",
    "more tokens than rows here": "valid_vocab must be an integer from 1 to V = .*shard_sizes",
    "a tail of a served id behind the last": "token_ids must lie below V = 41",
}


@pytest.mark.parametrize("name", REFUSALS)
def test_every_rank_is_told_what_is_wrong(found, name):
    for rank in (0, 1):
        with pytest.raises(ValueError, match=REFUSALS[name]):
            raise ValueError(found[rank]["refusals"][name].removeprefix("ValueError: "))


@pytest.mark.parametrize("name", worker.COMPILED)
def test_compiled_whole_graph_equals_eager(found, name):
    for rank in (0, 1):
        for one, other in zip(*found[rank]["compiled"][name], strict=True):
            assert_close(one, other, torch.float64)


@pytest.mark.parametrize("name", worker.ADDING)
def test_ranks_that_share_the_tokens_add_up_to_the_whole(found, name):
    parts = [found[rank]["tensor and data parallel"][f"tokens, {name}"] for rank in range(4)]
    exact = truth(worker.adding(name), 41)
    for key in ("loss", "dweight", "dbias"):
        assert_close(sum(part[key] for part in parts), exact[key], torch.float64, key)
    for key in ("token_loss", "dhidden"):
        assert_close(torch.cat([part[key] for part in parts]), exact[key], torch.float64, key)


@pytest.mark.parametrize("name", worker.ADDING)
def test_tokens_and_head_may_both_be_shared(found, name):
    halves = [
        joined([found[rank]["tensor and data parallel"][f"pairs, {name}"] for rank in pair])
        for pair in ((0, 1), (2, 3))
    ]
    exact = truth(worker.adding(name), 41)
    for key in ("loss", "dweight", "dbias"):
        assert_close(sum(half[key] for half in halves), exact[key], torch.float64, key)
    for key in ("token_loss", "dhidden"):
        assert_close(torch.cat([half[key] for half in halves]), exact[key], torch.float64, key)
