"""One of two processes that wrap an attached model in many ways and compare gradients.

Each layout is built twice, from one seed: as it is in one process, and wrapped.  Both see the same
four sequences, two on each rank where the model is wrapped.
"""

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from typing import Any
from unittest import mock

import peft
import torch
import torch.distributed as dist
from tiny_models import random_ids, tiny_model
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    CheckpointWrapper,
    apply_activation_checkpointing,
)
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

from fused_sd import TeacherTopK, divergence_loss, entry_log_probs, grpo_loss
from fused_sd.engine import gradients
from fused_sd.integrations.shared.completion_scores import CompletionForward, with_head
from fused_sd.integrations.transformers import (
    Request,
    attach,
    completion_positions,
    hidden_states,
    unwrap,
)

NUM_TOKENS = 4
POSITIONS = completion_positions(NUM_TOKENS)
BF16 = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
LORA = {"r": 4, "target_modules": ["q_proj"], "init_lora_weights": False}


def mixed(model: nn.Module, ids: Tensor, weights: Tensor) -> Tensor:
    """A truncated and a full objective, against the model itself on other inputs."""
    with torch.no_grad():
        teacher = model(input_ids=ids.flip(1), fused_sd=Request(hidden_states, POSITIONS)).result

    def compute(hidden, head):
        entries = entry_log_probs(hidden, head, 5, token_weights=weights)
        loss = divergence_loss(
            hidden, head, teacher, head, token_weights=weights, reduction="sum"
        ).loss
        return entries.log_probs, loss

    log_probs, loss = model(input_ids=ids, fused_sd=Request(compute, POSITIONS)).result
    return loss + (log_probs * torch.arange(5.0) * weights[..., None]).sum()


def against_a_copy(
    model: nn.Module, ids: Tensor, weights: Tensor, teacher: nn.Module, padding_free: bool = False
) -> Tensor:
    """The divergence from other weights, whose head is whole in their own forward alone."""
    mask = torch.ones_like(ids)
    mask[0, :2] = 0

    def forward(who: nn.Module) -> CompletionForward:
        return CompletionForward(who, ids, mask, NUM_TOKENS, padding_free=padding_free)

    with torch.no_grad():
        states, held = forward(teacher)(with_head(outlives_forward=True))

    def compute(hidden, head):
        other = held.beside(head)
        return divergence_loss(
            hidden, head, states, other, token_weights=weights, reduction="sum"
        ).loss

    return forward(model)(compute)


def policy(model: nn.Module, ids: Tensor, weights: Tensor) -> Tensor:
    """GRPO on the sampled tokens."""

    def compute(hidden, head):
        return grpo_loss(
            hidden,
            head,
            ids[:, -NUM_TOKENS:],
            torch.arange(1.0, len(ids) + 1)[:, None].expand(-1, NUM_TOKENS),
            token_weights=weights,
            reduction="sum",
        ).loss

    return model(input_ids=ids, fused_sd=Request(compute, POSITIONS)).result


def sparse(model: nn.Module, ids: Tensor, weights: Tensor) -> Tensor:
    """Gradients in entries, for which backward reads the head; the last token's row is dense."""
    with torch.no_grad():
        teacher = model(input_ids=ids.flip(1), fused_sd=Request(hidden_states, POSITIONS)).result
    flat = torch.tensor([1.0, 1.0, 1.0, 0.03])[:, None]
    kinds: tuple[dict[str, Any], ...] = (
        {"gradient": "sparse", "tolerance": 0.1},
        {"gradient": "sparse", "tolerance": 0.1, "reduction": "none"},
        {"support": TeacherTopK(6), "remainder": "renormalize"},
    )

    def compute(hidden, head):
        sides = hidden * flat, head, teacher.to(hidden.dtype) * flat, head
        run = {"temperature": 0.3, "token_weights": weights, "reduction": "sum"}
        return [divergence_loss(*sides, **{**run, **kind}) for kind in kinds]

    with mock.patch.object(gradients, "MOST", 20):
        summed, each, exact = model(input_ids=ids, fused_sd=Request(compute, POSITIONS)).result
    assert torch.equal(each.certificate.dense, (flat.t() < 1) & (weights != 0))
    assert bool(summed.certificate.kept.any()) == bool(weights.any())
    return summed.loss + (each.loss * torch.arange(1.0, NUM_TOKENS + 1)).sum() + exact.loss


def ddp(model: nn.Module) -> nn.Module:
    return DistributedDataParallel(model)


def fsdp(model: nn.Module, *units: str, reshard_root: bool = True, policy: Any = None) -> nn.Module:
    """Layers, then each group of modules named in a unit, then the root."""
    settings = {} if policy is None else {"mp_policy": policy}
    inner = unwrap(model)
    for layer in inner.model.layers:
        fully_shard(layer, **settings)
    for unit in units:
        modules = [inner.get_submodule(name) for name in unit.split()]
        fully_shard(modules, reshard_after_forward=False, **settings)
    return fully_shard(model, reshard_after_forward=reshard_root, **settings)


def checkpointed(model: nn.Module) -> nn.Module:
    inner = unwrap(model)
    enable = getattr(inner, "activation_checkpointing_enable", inner.gradient_checkpointing_enable)
    enable({"use_reentrant": False})
    return model.train()


def checkpoint_wrapped(model: nn.Module) -> nn.Module:
    layers = set(unwrap(model).model.layers)
    apply_activation_checkpointing(model, check_fn=layers.__contains__)
    assert isinstance(unwrap(model).model.layers[0], CheckpointWrapper)
    return model


def adapted(model: nn.Module, **settings: Any) -> nn.Module:
    return peft.get_peft_model(model, peft.LoraConfig(**{**LORA, **settings}))


@dataclass(frozen=True)
class Layout:
    """How a model is wrapped, and what it computes.

    Attributes:
        prepare: what becomes of the model in one process as well.
        wrap: what becomes of it in two.
        teacher: another model is the teacher, wrapped alike.
        autocast: both run in bf16 autocast.
        empty: rank 1 has no tokens.
        late: attached after wrapping.
        dtype: what the wrapping computes in, and the model in one process.
        tolerance: of each parameter's largest gradient.
    """

    wrap: Callable[[nn.Module], nn.Module]
    prepare: Callable[[nn.Module], nn.Module] = lambda model: model
    loss: Callable[..., Tensor] = mixed
    model: dict[str, Any] = field(default_factory=dict)
    teacher: bool = False
    autocast: bool = False
    empty: bool = False
    late: bool = False
    dtype: torch.dtype = torch.float32
    tolerance: float = 1e-6


def sixteen_bit(wrap: Callable[[nn.Module], nn.Module]) -> Layout:
    """Without entries: rounding chooses others."""
    return Layout(wrap, loss=against_a_copy, teacher=True, dtype=torch.bfloat16, tolerance=0.02)


TIED = {"tie_word_embeddings": True}
HEAD, NORM_HEAD = "lm_head", "model.norm lm_head"
LAYOUTS = {
    "ddp": Layout(ddp),
    "ddp, late": Layout(ddp, late=True),
    "ddp, tied": Layout(ddp, model=TIED),
    "ddp, one rank without tokens": Layout(ddp, empty=True),
    "ddp, a copy teaches": Layout(ddp, loss=against_a_copy, teacher=True),
    "ddp, padding-free": Layout(
        ddp, loss=partial(against_a_copy, padding_free=True), teacher=True, tolerance=1e-5
    ),
    "ddp, checkpointed": Layout(ddp, checkpointed),
    "ddp, autocast": Layout(ddp, autocast=True),
    "ddp, policy, one rank without tokens": Layout(ddp, loss=policy, empty=True),
    "ddp, sparse": Layout(ddp, loss=sparse),
    "ddp, tied, sparse": Layout(ddp, loss=sparse, model=TIED),
    "root": Layout(fsdp),
    "root kept": Layout(partial(fsdp, reshard_root=False)),
    "root, tied": Layout(fsdp, model=TIED),
    "root, one rank without tokens": Layout(fsdp, empty=True),
    "root, policy": Layout(fsdp, loss=policy),
    "root, a copy teaches": Layout(fsdp, loss=against_a_copy, teacher=True),
    "root, padding-free": Layout(
        fsdp, loss=partial(against_a_copy, padding_free=True), teacher=True, tolerance=1e-5
    ),
    "root, checkpointed": Layout(fsdp, checkpointed),
    "root, checkpoint wrapper": Layout(fsdp, checkpoint_wrapped),
    "root, sparse": Layout(fsdp, loss=sparse),
    "root, checkpointed, sparse": Layout(fsdp, checkpointed, loss=sparse),
    "root, bf16": sixteen_bit(partial(fsdp, policy=BF16)),
    "head alone": Layout(lambda m: fsdp(m, HEAD)),
    "head alone, late": Layout(lambda m: fsdp(m, HEAD), late=True),
    "head alone, a copy teaches": Layout(
        lambda m: fsdp(m, HEAD), loss=against_a_copy, teacher=True
    ),
    "head alone, one rank without tokens": Layout(lambda m: fsdp(m, HEAD), empty=True),
    "head alone, sparse, one rank without tokens": Layout(
        lambda m: fsdp(m, HEAD), loss=sparse, empty=True
    ),
    "norm and head": Layout(lambda m: fsdp(m, NORM_HEAD)),
    "norm and head, checkpointed": Layout(lambda m: fsdp(m, NORM_HEAD), checkpointed),
    "norm and head, bf16": sixteen_bit(lambda m: fsdp(m, NORM_HEAD, policy=BF16)),
    "adapters, ddp": Layout(ddp, adapted),
    "adapters on the head, ddp": Layout(
        ddp, partial(adapted, target_modules=["q_proj", "lm_head"])
    ),
    "adapters and a saved head, ddp": Layout(ddp, partial(adapted, modules_to_save=["lm_head"])),
    "adapters, one rank without tokens, ddp": Layout(ddp, adapted, empty=True),
    "adapters, root": Layout(fsdp, adapted),
    "adapters on the head, root": Layout(
        fsdp, partial(adapted, target_modules=["q_proj", "lm_head"])
    ),
    "adapters on the head, root, sparse": Layout(
        fsdp, partial(adapted, target_modules=["q_proj", "lm_head"]), loss=sparse
    ),
    "adapters and a saved head, root": Layout(fsdp, partial(adapted, modules_to_save=["lm_head"])),
}


def build(layout: Layout, seed: int, wrap: bool) -> nn.Module:
    torch.manual_seed(seed)
    model = layout.prepare(tiny_model("Llama", vocab=96, **layout.model))
    if not layout.late:
        attach(model)
    if wrap:
        model = layout.wrap(model)
    else:
        for parameter in model.parameters():  # not the rotary buffers
            parameter.data = parameter.data.to(layout.dtype)
    return attach(model) if layout.late else model


def largest_difference(layout: Layout, rank: int) -> float:
    """Of a gradient, relative to the largest of its parameter."""
    ids = random_ids(4, 9, vocab=96)
    weights = torch.ones(4, NUM_TOKENS)
    weights[1, 2:] = 0
    if layout.empty:
        weights[2:] = 0
    reference, model = (build(layout, 0, wrap) for wrap in (False, True))
    others = [{}, {}]
    if layout.teacher:
        others = [{"teacher": build(layout, 1, wrap)} for wrap in (False, True)]

    def backward(model: nn.Module, half: int, other: dict[str, Any]) -> float:
        rows = slice(2 * half, 2 * half + 2)
        # a context each: autocast keeps 16-bit copies, in which gradients would add up
        with torch.autocast("cpu", torch.bfloat16, enabled=layout.autocast):
            loss = layout.loss(model, ids[rows], weights[rows], **other)
        (loss / 2 if model is reference else loss).backward()
        return loss.item()

    expected = [backward(reference, half, others[0]) for half in range(2)][rank]
    worst = abs(backward(model, rank, others[1]) - expected) / max(abs(expected), 1.0)
    trained = 0
    for own, other in zip(model.parameters(), reference.parameters(), strict=True):
        assert (own.grad is None) == (other.grad is None)
        if other.grad is not None:
            trained += 1
            assert whole(own.grad).isfinite().all()
            scale = other.grad.abs().max().clamp(min=1e-30)
            worst = max(
                worst, float((whole(own.grad).float() - other.grad.float()).abs().max() / scale)
            )
    assert trained
    return worst


def whole(gradient: Tensor) -> Tensor:
    return gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient


def main(rank: int, folder: str, layouts: tuple[str, ...]) -> None:
    """Write the largest relative difference of a gradient, or an error, for each layout."""
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE="2")
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=2,
        timeout=timedelta(seconds=300),  # an error instead of a hang
    )
    for name in layouts:
        worst = largest_difference(LAYOUTS[name], rank)
        with open(f"{folder}/worst{rank}", "a") as file:
            file.write(f"{name}={worst}\n")


def zero3(rank: int, folder: str, port: int, name: str = "mixed") -> None:
    """Write the largest relative difference of a gradient under DeepSpeed's ZeRO-3."""
    loss = {"mixed": mixed, "sparse": sparse}[name]
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2")
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), DS_ACCELERATOR="cpu")
    import deepspeed
    from deepspeed.utils import safe_get_full_grad

    # a kernel for shared memory, which it would compile here
    sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None
    deepspeed.init_distributed("gloo")
    ids, weights = random_ids(4, 9, vocab=96), torch.ones(4, NUM_TOKENS)
    reference, model = (build(Layout(ddp), 0, wrap=False) for _ in range(2))
    engine, *_ = deepspeed.initialize(
        model=model,
        model_parameters=list(model.parameters()),
        config={
            "train_micro_batch_size_per_gpu": 2,
            "optimizer": {"type": "SGD", "params": {"lr": 0.1}},
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            # every parameter is sharded, however small
            "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
        },
    )
    for half in (slice(0, 2), slice(2, 4)):
        (loss(reference, ids[half], weights[half]) / 2).backward()
    half = slice(2 * rank, 2 * rank + 2)
    assert model.lm_head.weight.numel() == 0
    engine.backward(loss(engine, ids[half], weights[half]))
    worst = 0.0
    for own, other in zip(model.parameters(), reference.parameters(), strict=True):
        difference = (safe_get_full_grad(own) - other.grad).abs().max() / other.grad.abs().max()
        worst = max(worst, float(difference))
    with open(f"{folder}/zero{rank}", "w") as file:
        file.write(str(worst))
