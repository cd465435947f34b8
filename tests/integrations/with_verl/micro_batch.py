"""A micro-batch as in verl's engines: packed sequences, some response tokens without a loss."""

from dataclasses import dataclass
from types import SimpleNamespace

import torch
from tensordict import TensorDict
from torch import Tensor
from verl.utils import tensordict_utils
from verl.workers.config import DistillationConfig

LENGTHS = ((3, 5), (2, 7), (4, 1))  # of prompts and responses
VOCAB, HIDDEN, TOPK = 61, 12, 4
NUM_ROWS = sum(map(sum, LENGTHS))


@dataclass
class MicroBatch:
    """The model's states at each packed row, and verl's data."""

    hidden: Tensor  # (N, D)
    weight: Tensor  # (V, D)
    data: TensorDict
    labels: Tensor  # (N,) each row's next token
    counted: Tensor  # (N,) bool, the row predicts a counted response token

    @property
    def teacher_ids(self) -> Tensor:
        return self.data["teacher_ids"].values()

    @property
    def teacher_log_probs(self) -> Tensor:
        return self.data["teacher_logprobs"].values()

    def jagged(self, values: Tensor) -> Tensor:
        """Turn values of each packed row into the engines' jagged form."""
        offsets = self.data["input_ids"].offsets()
        return torch.nested.nested_tensor_from_jagged(values, offsets)

    def at_responses(self, values: Tensor) -> Tensor:
        """Select the rows that predict the response, padded: (B, R)."""
        from verl.workers.utils.padding import no_padding_2_padding

        return no_padding_2_padding(values, self.data)

    @property
    def mask(self) -> Tensor:
        """(B, R) bool."""
        return self.data["response_mask"].to_padded_tensor(0).bool()


def jagged(rows: list[Tensor]) -> Tensor:
    return torch.nested.as_nested_tensor(rows, layout=torch.jagged)


def make(dtype: torch.dtype = torch.float64, k: int = TOPK) -> MicroBatch:
    """Make a micro-batch.  Like verl, fill rows without a teacher with k times id 0, log-prob 0."""
    hidden = torch.randn(NUM_ROWS, HIDDEN, dtype=dtype).requires_grad_()
    weight = torch.randn(VOCAB, HIDDEN, dtype=dtype).requires_grad_()
    ids = [torch.randint(0, VOCAB, (p + r,)) for p, r in LENGTHS]
    near = hidden.detach() + 0.3 * torch.randn(NUM_ROWS, HIDDEN, dtype=dtype)
    known = (near @ weight.detach().t()).log_softmax(-1).topk(k)
    entries, log_probs = known.indices.int(), known.values.float()
    ends = torch.tensor(LENGTHS).sum(-1).cumsum(0) - 1
    entries[ends], log_probs[ends] = 0, 0.0
    masks = [torch.ones(r, dtype=torch.long) for _, r in LENGTHS]
    masks[1][2:4] = 0  # a tool's answer
    sizes = [p + r for p, r in LENGTHS]
    lengths = [r for _, r in LENGTHS]
    data = tensordict_utils.get_tensordict(
        {
            "input_ids": jagged(ids),
            "prompts": jagged([row[:p] for row, (p, _) in zip(ids, LENGTHS)]),
            "responses": jagged([row[p:] for row, (p, _) in zip(ids, LENGTHS)]),
            "response_mask": jagged(masks),
            "teacher_ids": jagged(list(entries.split(sizes))),
            "teacher_logprobs": jagged(list(log_probs.split(sizes))),
            "advantages": jagged([torch.randn(r) for r in lengths]),
            "old_log_probs": jagged([-3 * torch.rand(r) for r in lengths]),
        },
        {"dp_size": 1, "batch_num_tokens": 11, "global_batch_size": 3},
    )
    counted = torch.zeros(NUM_ROWS, dtype=torch.bool)
    start = 0
    for (p, r), mask in zip(LENGTHS, masks):
        counted[start + p - 1 : start + p + r - 1] = mask.bool()
        start += p + r
    return MicroBatch(hidden, weight, data, torch.roll(torch.cat(ids), -1), counted)


def actor(strategy: str = "fsdp2") -> SimpleNamespace:
    """The part of verl's actor configuration that the losses read."""
    return SimpleNamespace(
        strategy=strategy,
        loss_agg_mode="token-mean",
        loss_scale_factor=None,
        global_batch_info={},
    )


def distillation(loss) -> DistillationConfig:
    return DistillationConfig(distillation_loss=loss)
