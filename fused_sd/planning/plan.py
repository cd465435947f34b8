"""What a loss will cost: ``fused_sd.plan``.

Dimension key:  N tokens, D hidden size, V vocabulary
"""

from collections.abc import Callable, Mapping
from os import PathLike
from typing import Any

import torch

from fused_sd import checks
from fused_sd.divergence import Divergence
from fused_sd.head_sizes import head_size
from fused_sd.planning import certified, eager, fused, liger, timing, token_peers, trl
from fused_sd.planning.devices import Device, find_device
from fused_sd.planning.objectives import Objective, choose
from fused_sd.planning.result import Estimate, Plan
from fused_sd.planning.walk import num_entries
from fused_sd.planning.workload import Peer, Workload, peak, total
from fused_sd.support import Support
from fused_sd.verify.choices import DTYPES

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
    token_peers.CCE,
    token_peers.QUACK,
)
PLANNED_DTYPES = ("bf16", "fp16", "fp32")
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
    world_size: int = 1,
    device: str | torch.device | None = None,
    free_bytes: int | None = None,
    rate: float | None = None,
    chunk_size: int | None = None,
) -> Plan:
    """Memory, chunk and time of a loss, of this library, eager PyTorch and others, beforehand.

    Peaks are of forward and backward of the loss alone, from hidden states on: beyond the inputs,
    the gradients included.  Everything is per rank: tokens are divided over the ranks, while the
    head, its gradient and the workspaces are each rank's own.

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
        world_size: ranks.
        device: where it will run (its free memory is asked for now), or a card by its name
            ("H200", of whose whole memory is thought); None: the GPU where there is one.
        free_bytes: bytes that are free when the loss begins and its hidden states are not there.
        rate: FLOP/s of the device's GEMMs, for the time's bound where nothing was measured.
        chunk_size: as a loss's own.

    Raises:
        ValueError: an argument is out of range, or names nothing that is known.
    """
    head = head_size(model, hidden_size, vocab)
    _check(tokens, world_size, reduction, masked, chunk_size)
    dtype_name = _dtype_name(dtype)
    other = head if teacher is None else head_size(teacher)
    shared = teacher is None if shared_head is None else shared_head
    if shared and other != head:
        checks.fail(
            "shared_head",
            "be False for a teacher of another size",
            f"{tuple(other)} and {tuple(head)}",
            "leave it out",
        )
    found = find_device(device, free_bytes, rate)
    chosen = choose(objective, divergence, support, remainder)
    _check_gradient(gradient, kept, dense_share, chosen)
    is_sparse = gradient == "sparse" and not num_entries(chosen)

    def workload(tokens_of_rank: int) -> Workload:
        return Workload(
            tokens=tokens_of_rank,
            active=max(1, round(tokens_of_rank * (1 - masked))),
            hidden_size=head.hidden_size,
            vocab=head.vocab,
            teacher_hidden_size=other.hidden_size,
            teacher_vocab=other.vocab,
            element=DTYPES[dtype_name].itemsize,
            objective=chosen,
            trained=train_head,
            reduced=reduction != "none",
            kind=found.kind,
            shared_head=shared,
            free_bytes=found.free_bytes,
            chunk_size=chunk_size,
            kept=(certified.KEPT if kept is None else kept) if is_sparse else None,
            dense_share=dense_share or 0.0,
        )

    work = workload(-(-tokens // world_size))
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
        tokens_per_rank=work.tokens,
        active_per_rank=work.active,
        device=found.name,
        free_bytes=found.free_bytes,
        is_whole_card=found.is_whole,
        chunk=layout.chunk,
        group=layout.group,
        walks=certified.walks(work) if is_sparse else fused.walks(work),
        kept=work.kept,
        dense_share=work.dense_share,
        estimates=tuple(
            _estimate(peer, workload, work, found, dtype_name, world_size)
            for peer in PEERS
            if peer.moments(work)
        ),
    )


def _estimate(
    peer: Peer,
    workload: Callable[[int], Workload],
    work: Workload,
    device: Device,
    dtype: str,
    world_size: int,
) -> Estimate:
    parts = peak(peer.moments(work))
    time = timing.expected(work, peer, device.name, device.rate, str(DTYPES[dtype])[6:])
    return Estimate(
        provider=peer.name,
        peak_bytes=total(parts),
        parts=parts,
        fits=_needs(peer, work) <= device.free_bytes,
        longest_tokens=world_size * _longest(peer, workload, device.free_bytes),
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


def _check(
    tokens: object, world_size: object, reduction: object, masked: float, chunk_size: int | None
) -> None:
    for name, value in (("tokens", tokens), ("world_size", world_size)):
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            checks.fail(name, "be an integer of at least 1", repr(value), "pass their number")
    checks.check_reduction(reduction)
    ok = isinstance(masked, int | float) and 0 <= masked < 1
    checks.check_number("masked", masked, "lie in [0, 1)", ok, "0.5 leaves half of the tokens")
    if chunk_size is not None:
        checks.check_positive_int("chunk_size", chunk_size)


def _check_gradient(
    gradient: object, kept: int | None, dense_share: float | None, objective: Objective
) -> None:
    checks.check_one_of("gradient", gradient, ("dense", "sparse"))
    if gradient == "dense":
        for name, value in (("kept", kept), ("dense_share", dense_share)):
            if value is not None:
                remedy = "pass gradient='sparse', or leave it out"
                checks.fail(name, "come with gradient='sparse'", repr(value), remedy)
        return
    if objective.is_per_token:
        remedy = "leave it out: log-probabilities have dense gradients"
        checks.fail("gradient", "be 'dense' for token_log_probs", repr(gradient), remedy)
    if kept is not None:
        checks.check_positive_int("kept", kept)
    if dense_share is not None:
        ok = isinstance(dense_share, int | float) and 0 <= dense_share <= 1
        checks.check_number("dense_share", dense_share, "lie in [0, 1]", ok, "0.1 is one in ten")


def _dtype_name(dtype: torch.dtype | str) -> str:
    for name in PLANNED_DTYPES:
        if dtype in (name, DTYPES[name]):
            return name
    checks.fail("dtype", "be bf16, fp16 or fp32", repr(dtype), "plan for the operands' dtype")
    raise AssertionError


def _name(model: Model | None) -> str:
    if isinstance(model, str | PathLike):
        return str(model)
    return "a head" if model is None else "a configuration"
