"""What a loss will cost: ``fused_sd.plan``.

Dimension key:  N tokens, D hidden size, V vocabulary
"""

from collections.abc import Callable, Mapping
from os import PathLike
from typing import Any

import torch

from fused_sd import checks
from fused_sd.measuring.dtypes import DTYPES
from fused_sd.measuring.head_sizes import head_size
from fused_sd.planning import certified, checking, eager, fused, liger, timing, token_peers, trl
from fused_sd.planning.chunked import num_entries
from fused_sd.planning.devices import Device, find_device
from fused_sd.planning.objectives import choose
from fused_sd.planning.prediction import predict
from fused_sd.planning.result import Estimate, Plan
from fused_sd.planning.wire import traffic
from fused_sd.planning.workload import Peer, Workload, peak, total
from fused_sd.terms.divergence import Divergence
from fused_sd.terms.support import Support

PEERS: tuple[Peer, ...] = (
    certified.SPARSE,  # where it is asked for
    fused.FUSED_SD,
    eager.EAGER,
    eager.EAGER_FP32,
    trl.TRL_DIVERGENCE,
    trl.TRL_LOG_PROBS,
    eager.TRL_SDPO,
    liger.LIGER_FUSED_JSD,
    liger.LIGER_CHUNKED_JSD,
    token_peers.VERL,
    token_peers.VERL_MEGATRON,
    token_peers.CCE,
    token_peers.QUACK,
)
MAX_TOKENS = 2**34  # beyond which nobody asks how many would fit

Model = str | PathLike[str] | Mapping[str, Any] | object


def plan(
    model: Model | None = None,
    *,
    tokens: int,
    hidden_size: int | None = None,
    vocab: int | None = None,
    teacher: Model | None = None,
    shared_head: bool | None = None,
    objective: str = "sdpo",
    divergence: Divergence | None = None,
    support: Support | None = None,
    remainder: str | None = None,
    dtype: torch.dtype | str = torch.bfloat16,
    train_head: bool = True,
    reduction: str = "mean",
    gradient: str = "dense",
    kept: int | None = None,
    dense_share: float | None = None,
    masked: float = 0.0,
    tensor_parallel: int = 1,
    world_size: int | None = None,
    device: str | torch.device | None = None,
    free_bytes: int | None = None,
    rate: float | None = None,
    link: float | None = None,
    chunk_size: int | None = None,
) -> Plan:
    """Memory, chunk and time of a loss, of this library, eager PyTorch and others, beforehand.

    Peaks are of forward and backward of the loss alone, from hidden states on: beyond the inputs,
    the gradients included.  Everything is per rank.  Tokens are divided over the ranks, but ranks
    that share a head hold the same ones: each has the whole hidden states and their gradient, its
    own rows of the head, their gradient, and the logits of its columns.

    Args:
        model: a known name (``fused_sd.head_sizes.MODELS``), a path to a ``config.json`` or to
            its folder, or a transformers configuration or its dict; or pass the sizes.
        tokens: N of the whole batch, over all ranks.
        hidden_size, vocab: of the head, instead of a model.
        teacher: a model with another head; None: the student's sizes.
        shared_head: whether both sides have one head tensor; None: unless a teacher is given.
        objective: a loss by its name (``fused_sd.planning.objectives.OBJECTIVES``), or
            "divergence".
        divergence, support, remainder: of a divergence, instead of the objective's own.
        dtype: of hidden states and head: bf16, fp16 or fp32.
        train_head: whether the head has a gradient.
        reduction: "mean", "sum" or "none"; per-token losses of a trained head walk twice.
        gradient: "dense", or "sparse" as the losses take it; a renormalised support has entries
            either way.
        kept: entries that a token's sparse gradient is expected to keep; None: 64.
        dense_share: share of the tokens whose gradient is expected to be dense nevertheless; None:
            0.  Both are in the certificate of a loss that was computed.
        masked: share of the tokens that have weight 0, in [0, 1).
        tensor_parallel: ranks that share a head, each with as many of its rows; those whose rows
            are most are planned.  Implementations that cannot are left out.
        world_size: ranks, a multiple of those that share a head; None: just these.
        device: where it will run (its free memory is asked for now), or a card by its name
            ("H200", of whose whole memory is thought); None: the GPU where there is one.
        free_bytes: bytes that are free when the loss begins and its hidden states are not there.
        rate: FLOP/s of the device's GEMMs, for the time's bound where nothing was measured.
        link: bytes/s that collectives send from one device to the next, for the prediction.
        chunk_size: as a loss's own.

    Raises:
        ValueError: an argument is out of range, or names nothing that is known.
    """
    head = head_size(model, hidden_size, vocab)
    world_size = tensor_parallel if world_size is None else world_size
    checking.check_sizes(tokens, world_size, tensor_parallel, reduction, masked, chunk_size)
    dtype_name = checking.dtype_name(dtype)
    other = head if teacher is None else head_size(teacher)
    shared = teacher is None if shared_head is None else shared_head
    if shared and other != head:
        checks.fail(
            "shared_head",
            "be False for a teacher of another size",
            f"{tuple(other)} and {tuple(head)}",
            "leave it out",
        )
    found = find_device(device, free_bytes, rate, link)
    chosen = choose(objective, divergence, support, remainder)
    checking.check_gradient(gradient, kept, dense_share, chosen)
    is_sparse = gradient == "sparse" and not num_entries(chosen)
    kept = certified.KEPT if kept is None else kept

    def workload(tokens_of_rank: int) -> Workload:
        return Workload(
            tokens=tokens_of_rank,
            active=max(1, round(tokens_of_rank * (1 - masked))),
            hidden_size=head.hidden_size,
            vocab=-(-head.vocab // tensor_parallel),
            teacher_hidden_size=other.hidden_size,
            teacher_vocab=-(-other.vocab // tensor_parallel),
            element=DTYPES[dtype_name].itemsize,
            objective=chosen,
            trained=train_head,
            reduced=reduction != "none",
            kind=found.kind,
            shared_head=shared,
            free_bytes=found.free_bytes,
            chunk_size=chunk_size,
            kept=-(-kept // tensor_parallel) if is_sparse else None,
            dense_share=dense_share or 0.0,
            tensor_parallel=tensor_parallel,
        )

    num_groups = world_size // tensor_parallel
    work = workload(-(-tokens // num_groups))
    sends = traffic(work)
    layout = certified.layout(work) if is_sparse else fused.layout(work)
    return Plan(
        model=_name(model),
        objective=objective,
        hidden_size=head.hidden_size,
        vocab=head.vocab,
        dtype=dtype_name,
        train_head=train_head,
        reduction=reduction,
        tokens=tokens,
        world_size=world_size,
        tensor_parallel=tensor_parallel,
        shard_rows=work.vocab,
        tokens_per_rank=work.tokens,
        active_per_rank=work.active,
        device=found.name,
        free_bytes=found.free_bytes,
        is_whole_card=found.is_whole,
        chunk=layout.chunk,
        group=layout.group,
        walks=certified.walks(work) if is_sparse else fused.walks(work),
        kept=kept if is_sparse else None,
        dense_share=work.dense_share,
        traffic=sends,
        prediction=None if is_sparse else predict(work, sends, found.rates),
        estimates=tuple(
            _estimate(peer, workload, work, found, dtype_name, num_groups)
            for peer in PEERS
            if peer.moments(work) and (peer.shards or tensor_parallel == 1)
        ),
    )


def _estimate(
    peer: Peer,
    workload: Callable[[int], Workload],
    work: Workload,
    device: Device,
    dtype: str,
    num_groups: int,
) -> Estimate:
    parts = peak(peer.moments(work))
    time = timing.expected(work, peer, device.name, device.rates.gemms, str(DTYPES[dtype])[6:])
    return Estimate(
        provider=peer.name,
        peak_bytes=total(parts),
        parts=parts,
        fits=_needs(peer, work) <= device.free_bytes,
        longest_tokens=num_groups * _longest(peer, workload, device.free_bytes),
        seconds=time.seconds,
        seconds_source=time.source,
        source=peer.source,
    )


def _needs(peer: Peer, work: Workload) -> int:
    return work.inputs_bytes + total(peak(peer.moments(work)))


def _longest(peer: Peer, workload: Callable[[int], Workload], free_bytes: int) -> int:
    """Most tokens of a rank whose inputs and peak fit; 0: not one."""
    low, high = 0, 1
    while high <= MAX_TOKENS and _needs(peer, workload(high)) <= free_bytes:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        if _needs(peer, workload(middle)) <= free_bytes:
            low = middle
        else:
            high = middle
    return low


def _name(model: Model | None) -> str:
    if isinstance(model, str | PathLike):
        return str(model)
    return "a head" if model is None else "a configuration"
