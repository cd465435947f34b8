"""One of two processes that wrap an attached model in DDP and FSDP2 and compare gradients."""

import os

import torch
import torch.distributed as dist
from tiny_models import random_ids, tiny_model
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from fused_sd import divergence_loss, entry_log_probs
from fused_sd.integrations.transformers import (
    Request,
    attach,
    completion_positions,
    hidden_states,
)

NUM_TOKENS = 4
POSITIONS = completion_positions(NUM_TOKENS)


def loss_of(model: nn.Module, ids: Tensor) -> Tensor:
    """A truncated and a full objective, against the model itself on other inputs."""
    with torch.no_grad():
        teacher = model(input_ids=ids.flip(1), fused_sd=Request(hidden_states, POSITIONS)).result

    def compute(hidden, head):
        entries = entry_log_probs(hidden, head, 5)
        return entries.log_probs, divergence_loss(hidden, head, teacher, head).loss

    log_probs, loss = model(input_ids=ids, fused_sd=Request(compute, POSITIONS)).result
    return loss + (log_probs * torch.arange(5.0)).sum()


def wrap(model: nn.Module, layout: str) -> nn.Module:
    """Attach before or after the wrapping; the head alone, with the norm, or in the root."""
    if layout == "ddp":
        return DistributedDataParallel(attach(model))
    if not layout.endswith("late"):
        attach(model)
    for layer in model.model.layers:
        fully_shard(layer)
    if "head alone" in layout:
        fully_shard(model.lm_head)
    if "norm and head" in layout:
        fully_shard([model.model.norm, model.lm_head], reshard_after_forward=False)
    fully_shard(model, reshard_after_forward=True)
    return attach(model) if layout.endswith("late") else model


def whole(gradient: Tensor) -> Tensor:
    return gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient


def main(rank: int, folder: str, layouts: tuple[str, ...]) -> None:
    """Write the largest relative difference of a gradient, for each layout."""
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE="2")
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    ids = random_ids(4, 9, vocab=96)
    for layout in layouts:
        torch.manual_seed(0)
        reference = attach(tiny_model("Llama", vocab=96))
        torch.manual_seed(0)
        model = wrap(tiny_model("Llama", vocab=96), layout)
        ((loss_of(reference, ids[:2]) + loss_of(reference, ids[2:])) / 2).backward()
        loss_of(model, ids[2 * rank : 2 * rank + 2]).backward()
        worst = 0.0
        for own, other in zip(model.parameters(), reference.parameters(), strict=True):
            difference = (whole(own.grad) - other.grad).abs().max() / other.grad.abs().max()
            worst = max(worst, float(difference))
        if rank == 0:
            with open(f"{folder}/worst", "a") as file:
                file.write(f"{layout}={worst}\n")
    dist.destroy_process_group()
