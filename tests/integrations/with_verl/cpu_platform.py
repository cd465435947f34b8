"""What verl's engine does on GPUs, on CPUs with gloo; the platform is that of the example.

Named in ``VERL_USE_EXTERNAL_MODULES``, this module is imported by verl in every process.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

import fused_sd.integrations.examples.verl_on_cpu  # noqa: F401  registers the platform "cpu"


def all_to_all_by_gloo(
    outputs: list[Tensor], inputs: list[Tensor], group: Any = None, async_op: bool = False
) -> None:
    """``dist.all_to_all`` for gloo, which implements only the form with single tensors."""
    assert not async_op
    received = torch.empty(sum(part.numel() for part in inputs), dtype=inputs[0].dtype)
    dist.all_to_all_single(received, torch.cat([part.flatten() for part in inputs]), group=group)
    for output, part in zip(outputs, received.chunk(len(outputs)), strict=True):
        output.copy_(part.view_as(output))


def use_ulysses_attention() -> None:
    """Register an attention for CPUs that exchanges heads for tokens as verl's flash attention."""
    from transformers import AttentionInterface
    from verl.utils import ulysses

    def attend(
        module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any
    ) -> tuple[Tensor, None]:
        group = ulysses.get_ulysses_sequence_parallel_group()
        parts = [torch.empty_like(kwargs["position_ids"]) for _ in range(2)]
        dist.all_gather(parts, kwargs["position_ids"].contiguous(), group=group)
        sequence = (torch.cat(parts, -1)[0] == 0).cumsum(0)
        whole = [  # (1, heads / 2, tokens, size)
            ulysses.gather_seq_scatter_heads(one, seq_dim=2, head_dim=1)
            for one in (query, key, value)
        ]
        allowed = (sequence[:, None] == sequence).tril()
        attended = torch.nn.functional.scaled_dot_product_attention(
            *whole, attn_mask=allowed, scale=kwargs["scaling"], enable_gqa=True
        )
        here = ulysses.gather_heads_scatter_seq(attended, head_dim=1, seq_dim=2)
        return here.transpose(1, 2).contiguous(), None

    AttentionInterface.register("packed_ulysses", attend)
