"""The averages of official codes, as weights of the tokens: loss and gradient."""

import official
import pytest
from closeness import assert_close
from official_batches import BATCHES, FLOAT, assert_same

import fused_sd

# the averages of official codes; a mask without any token is 0 / 0 in some of them
AVERAGES = {
    "verl token-mean": (
        "token_mean",
        {},
        lambda loss, mask: (loss * mask).sum() / mask.sum(),
    ),
    "verl token-mean over the global batch": (
        "token_mean",
        {"num_tokens": 41.0},
        lambda loss, mask: (loss * mask).sum() / 41.0,
    ),
    "verl token-sum": ("token_sum", {}, lambda loss, mask: (loss * mask).sum()),
    "verl seq-mean-token-sum": (
        "sequence_mean_token_sum",
        {},
        lambda loss, mask: (loss * mask).sum() / (mask.sum(-1) > 0).sum(),
    ),
    "verl seq-mean-token-mean": (  # verl adds 1e-8 to each sequence's number of tokens
        "sequence_mean_token_mean",
        {},
        lambda loss, mask: ((loss * mask).sum(-1) / mask.sum(-1).clamp(min=1))[
            mask.sum(-1) > 0
        ].mean(),
    ),
    "TRL sdpo, sdft and grpo": (
        "all_sequences_mean_token_mean",
        {},
        lambda loss, mask: ((loss * mask).sum(-1) / mask.sum(-1).clamp(min=1)).mean(),
    ),
    "TRL dr_grpo, verl seq-mean-token-sum-norm": (
        "constant_length",
        {"length": 12.0},
        lambda loss, mask: (loss * mask).sum() / (len(mask) * 12.0),
    ),
}


@pytest.mark.parametrize("kind", BATCHES)
@pytest.mark.parametrize("average", AVERAGES)
def test_an_average_as_weights_is_the_official_one(average, kind):
    mode, extra, exact = AVERAGES[average]
    batch = BATCHES[kind]()
    weights = fused_sd.aggregation_weights(batch.mask, mode, dtype=FLOAT, **extra)
    output = fused_sd.opsd_loss(*batch.sides, token_weights=weights, reduction="sum")
    sides = batch.student_logits().log_softmax(-1), batch.teacher_logits().log_softmax(-1)
    entries = official.kl(sides[1], sides[0]).clamp(max=0.05)
    assert_same(output.loss, exact(entries.sum(-1), batch.mask), batch, batch)


def test_the_sdpo_forks_norm_does_not_divide_by_the_batch():
    mask = BATCHES["ragged"]().mask
    weights = fused_sd.aggregation_weights(
        mask, "constant_length", length=12 / len(mask), dtype=FLOAT
    )
    assert_close(weights, mask / 12, FLOAT)
