"""A platform on which verl's FSDP2 engine runs on CPUs with gloo, chosen by ``VERL_PLATFORM=cpu``.

verl has no such platform.  Named in ``VERL_USE_EXTERNAL_MODULES``, this module is imported by verl
in every process.  FSDP1 cannot run on CPUs: torch refuses it.
"""

import contextlib
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from verl.plugin.platform import PlatformRegistry
from verl.plugin.platform.platform_base import PlatformBase


@PlatformRegistry.register(platform="cpu")
class PlatformCPU(PlatformBase):
    device_name = "cpu"
    vendor_name = "cpu"
    device_module: ModuleType = torch.cpu

    def is_available(self) -> bool:
        return True

    def is_platform_available(self, use_smi_check: bool = False) -> bool:
        return False  # so that it is chosen by name only

    def current_device(self) -> Any:
        return "cpu"  # verl hands it to Tensor.to

    def device_count(self) -> int:
        return 1

    def set_device(self, device_index: int) -> None: ...

    def synchronize(self, device_index: int | None = None) -> None: ...

    def manual_seed(self, seed: int) -> None:
        torch.manual_seed(seed)

    manual_seed_all = manual_seed

    def set_allocator_settings(self, settings: str) -> None: ...

    def empty_cache(self) -> None: ...

    def get_device_capability(self, device_index: int = 0) -> tuple[None, None]:
        return None, None

    def communication_backend_name(self) -> str:
        return "gloo"

    def visible_devices_envvar(self) -> str:
        return "CUDA_VISIBLE_DEVICES"

    @contextlib.contextmanager
    def nvtx_range(self, msg: str) -> Iterator[None]:
        yield

    def profiler_start(self) -> None: ...

    def profiler_stop(self) -> None: ...

    def ray_resource_name(self) -> str:
        return "CPU"

    def ray_noset_envvars(self) -> list[str]:
        return []

    def is_ipc_supported(self) -> bool:
        return False

    def cudart(self) -> None: ...


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
