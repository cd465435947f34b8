"""FlashAttention's functions for a CPU: the contract of flash-attn 2, in PyTorch and any dtype.

Dimension key:  B sequences, L positions, N tokens of all sequences, H heads, E size of a head
"""

import functools
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers import modeling_flash_attention_utils as seam

NAME = "flash_attention_2"


def flash_attn_varlen_func(
    q: Tensor,  # (N, H, E)
    k: Tensor,  # (N', H', E), H a multiple of H'
    v: Tensor,
    cu_seqlens_q: Tensor,  # (B + 1,) int32: the start of each sequence, and N
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),  # tokens before and behind that are seen; -1: all
    softcap: float = 0.0,
) -> Tensor:  # (N, H, E)
    """Attend inside each sequence.  The arguments that a kernel would misread are refused."""
    assert dropout_p == 0
    for bounds, longest, rows in ((cu_seqlens_q, max_seqlen_q, q), (cu_seqlens_k, max_seqlen_k, k)):
        assert bounds.dtype == torch.int32
        assert bounds[0] == 0
        assert bounds[-1] == len(rows)
        # a kernel launches blocks for so many rows, and leaves the others unwritten
        assert int(bounds.diff().max()) <= int(longest)
    own, others = (
        [slice(*edge) for edge in pairwise(bounds.tolist())]
        for bounds in (cu_seqlens_q, cu_seqlens_k)
    )
    rest = softmax_scale, causal, window_size, softcap
    return torch.cat([_attend(q[i], k[j], v[j], *rest) for i, j in zip(own, others)])


def flash_attn_func(
    q: Tensor,  # (B, L, H, E)
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
) -> Tensor:  # (B, L, H, E)
    assert dropout_p == 0
    rest = softmax_scale, causal, window_size, softcap
    return torch.stack([_attend(*row, *rest) for row in zip(q, k, v)])


def _attend(
    q: Tensor,  # (L, H, E)
    k: Tensor,  # (L', H', E)
    v: Tensor,
    scale: float | None,
    causal: bool,
    window: tuple[int, int],
    softcap: float,
) -> Tensor:  # (L, H, E)
    k, v = (side.repeat_interleave(q.size(1) // side.size(1), 1) for side in (k, v))
    scores = torch.einsum("qhe,khe->hqk", q, k) * (q.size(2) ** -0.5 if scale is None else scale)
    if softcap:
        scores = softcap * (scores / softcap).tanh()
    # the last query sees the last key
    ahead = torch.arange(len(k)) - torch.arange(len(q))[:, None] - (len(k) - len(q))
    before, behind = window[0], 0 if causal else window[1]
    hidden = torch.zeros_like(ahead, dtype=torch.bool)
    if behind >= 0:
        hidden |= ahead > behind
    if before >= 0:
        hidden |= ahead < -before
    return torch.einsum("hqk,khe->qhe", scores.masked_fill(hidden, -torch.inf).softmax(-1), v)


def stand_in(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """Let transformers take these functions for flash-attn's, until the test ends.

    Returns:
        The boundaries of each call of ``flash_attn_varlen_func``, which are appended.
    """
    calls: list[list[int]] = []

    @functools.wraps(flash_attn_varlen_func)  # transformers reads which arguments it has
    def recorded(*args: Any, cu_seqlens_q: Tensor, **kwargs: Any) -> Tensor:
        calls.append(cu_seqlens_q.tolist())
        return flash_attn_varlen_func(*args, cu_seqlens_q=cu_seqlens_q, **kwargs)

    loaded = {
        "_loaded_implementation": NAME,
        "_flash_fn": flash_attn_func,
        "_flash_varlen_fn": recorded,
        "_pad_fn": seam._pad_input,
        "_unpad_fn": seam._unpad_input,
        "_process_flash_kwargs_fn": seam._lazy_define_process_function(recorded),
    }
    for name, value in loaded.items():
        monkeypatch.setattr(seam, name, value)
    return calls


def use(model: PreTrainedModel) -> PreTrainedModel:
    """Let a model attend by FlashAttention, which ``set_attn_implementation`` refuses on a CPU."""
    model.config._attn_implementation_internal = NAME
    return model
