"""Sequences split over processes (Ulysses) train as whole ones do; rows are where they belong."""

import pytest
import torch
from engine_batches import make_samples
from engine_runs import RUNS, assert_same_training, remains
from verl.utils import tensordict_utils as tu
from verl.workers.utils.padding import left_right_2_no_padding, no_padding_2_padding

from fused_sd.integrations.verl.packed_rows import (
    Shard,
    matching_rows,
    predicting_rows,
    response_values,
)


def test_split_sequences_train_as_whole_ones():
    lengths = RUNS["ulysses"].lengths
    assert sum(map(sum, lengths[:2])) % 2 == sum(map(sum, lengths[2:])) % 2 == 1
    # of the first two, the first process has nothing but tokens of a prompt
    assert 2 * lengths[0][0] - 1 > sum(map(sum, lengths[:2]))
    assert_same_training(remains()["ulysses"], remains()["untied, policy, eager"])


def test_split_sequences_of_a_tied_model_train_as_whole_ones():
    assert_same_training(remains()["ulysses, tied"], remains()["tied, eager"])


def test_split_sequences_have_the_log_probs_of_whole_ones():
    both = [one["inferred"] for one in remains()["untied, policy, eager"]]
    for one in remains()["ulysses"]:
        for name, values in one["inferred"].items():
            whole = torch.cat(
                [torch.nn.functional.pad(b[name], (0, 12 - b[name].shape[1])) for b in both]
            )
            torch.testing.assert_close(values, whole, rtol=1e-5, atol=1e-5)


def jagged(name, samples):
    return torch.nested.as_nested_tensor([s[name] for s in samples], layout=torch.jagged)


@pytest.fixture
def samples():
    return list(make_samples(((5, 9), (3, 12), (7, 0), (1, 4))))


@pytest.fixture
def batch(samples):
    return tu.get_tensordict({name: jagged(name, samples) for name in samples[0]})


def padded(samples):
    """The same samples as verl's first trainer holds them: prompts left, responses right padded."""
    rows = []
    for sample in samples:
        left, right = 7 - len(sample["prompts"]), 12 - len(sample["responses"])
        pad = torch.nn.functional.pad
        length = len(sample["input_ids"])
        rows.append(
            {
                "prompts": pad(sample["prompts"], (left, 0)),
                "responses": pad(sample["responses"], (0, right)),
                "input_ids": pad(sample["input_ids"], (left, right)),
                "attention_mask": pad(torch.ones(length, dtype=torch.int64), (left, right)),
                "position_ids": pad(torch.arange(length), (left, right)),
                "response_mask": pad(sample["response_mask"], (0, right)),
                "old_log_probs": pad(sample["old_log_probs"], (0, right), value=7.0),
            }
        )
    stacked = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
    return left_right_2_no_padding(tu.get_tensordict(stacked))


def test_rows_are_those_that_verl_slices(batch):
    rows = predicting_rows(batch)
    marked = torch.zeros(len(batch["input_ids"].values()))
    marked[rows] = 1
    mask = batch["response_mask"].to_padded_tensor(0)
    assert torch.equal(no_padding_2_padding(marked, batch), mask.float())
    assert len(rows) == mask.sum()


def test_rows_of_a_padded_batch_are_the_same(batch, samples):
    assert torch.equal(predicting_rows(padded(samples)), predicting_rows(batch))


def test_rows_have_the_values_of_their_tokens(batch, samples):
    rows = predicting_rows(batch)
    ids = batch["input_ids"].values()[rows + 1]
    assert torch.equal(response_values(batch, "responses", rows), ids)
    kept = torch.cat([s["old_log_probs"][s["response_mask"] == 1] for s in samples])
    assert torch.equal(response_values(batch, "old_log_probs", rows), kept)
    assert torch.equal(response_values(padded(samples), "old_log_probs", rows), kept)


def test_without_responses_rows_are_those_before_counted_tokens(samples):
    masks = [torch.arange(len(s["input_ids"])) >= len(s["prompts"]) for s in samples]
    batch = tu.get_tensordict(
        {
            "input_ids": jagged("input_ids", samples),
            "loss_mask": torch.nested.as_nested_tensor(masks, layout=torch.jagged),
        }
    )
    counted = torch.cat(masks).roll(-1).nonzero()[:, 0]
    assert torch.equal(predicting_rows(batch), counted)


def test_a_teachers_rows_predict_the_same_tokens(batch):
    rows, longer = predicting_rows(batch), batch["teacher_input_ids"]
    there = matching_rows(rows, batch["input_ids"].offsets(), longer.offsets())
    assert torch.equal(longer.values()[there + 1], batch["input_ids"].values()[rows + 1])


@pytest.mark.parametrize("size", [1, 2, 4])
def test_shards_together_hold_each_row_once(batch, size):
    rows, offsets = predicting_rows(batch), batch["input_ids"].offsets()
    num_rows = -(-int(offsets[-1]) // size)
    values, found = torch.rand(size * num_rows), []
    for rank in range(size):
        shard = Shard(offsets, rank * num_rows, num_rows)
        here = shard.owned(rows)
        own = values[rank * num_rows :][:num_rows][shard.positions(here)]
        found.append(shard.scatter(own, here))
    expected = torch.zeros_like(values)
    expected[rows] = values[rows]
    assert torch.equal(torch.cat(found), expected)


def test_positions_of_a_padded_forward_are_those_of_the_rows(batch):
    rows, offsets = predicting_rows(batch), batch["input_ids"].offsets()
    values = batch["input_ids"].to_padded_tensor(0)
    shard = Shard(offsets, 0, int(offsets[-1]), values.shape[1])
    expected = batch["input_ids"].values()[rows]
    assert torch.equal(values.flatten()[shard.positions(rows)], expected)
