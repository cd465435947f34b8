"""``fused_sd.plan``: memory, chunk size and time of a loss, without running it.

Dimension key:  N tokens, D hidden size, V vocabulary
"""

from collections.abc import Callable, Mapping
from os import PathLike
from typing import Any

import torch

from fused_sd import checks
from fused_sd.measuring.dtypes import DTYPES
from fused_sd.measuring.head_sizes import head_size
from fused_sd.planning import certified, checking, eager, fused
from fused_sd.planning.chunked import num_entries
from fused_sd.planning.devices import Device, find_device
from fused_sd.planning.objectives import choose
from fused_sd.planning.prediction import predict
from fused_sd.planning.result import FLOOR, Estimate, Plan
from fused_sd.planning.wire import traffic
from fused_sd.planning.workload import Implementation, Workload, peak, total
from fused_sd.terms.divergence import Divergence
from fused_sd.terms.support import Support

IMPLEMENTATIONS: tuple[Implementation, ...] = (fused.FUSED_SD, eager.EAGER)
CERTIFIED = {"sparse": certified.SPARSE, "auto": certified.AUTO}  # listed first, by the gradient
MAX_TOKENS = 2**34  # largest answer to how many tokens fit

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
    """Plan a loss: its peak memory, chunk size and time, with eager PyTorch's as a yardstick.

    A peak is that of the loss's forward and backward, from hidden states on: bytes beyond the
    inputs, gradients included.  Every number is per rank.  The tokens are divided over the ranks,
    but ranks that share a head have the same tokens: each holds the whole hidden states and their
    gradient, its own rows of the head and their gradient, and the logits of its columns.

    Args:
        model: a known name (``fused_sd.measuring.head_sizes.MODELS``), a path to a ``config.json``
            or to its folder, a model that transformers finds in its cache or on the hub, or a
            transformers configuration or its dict.  Alternatively pass ``hidden_size`` and
            ``vocab``.
        tokens: N of the whole batch, over all ranks.
        hidden_size, vocab: sizes of the head, instead of a model.
        teacher: a model with another head; None: the student's sizes.
        shared_head: whether student and teacher have one head tensor; None: yes, unless a teacher
            is given.
        objective: a loss by its name (``fused_sd.measuring.losses.LOSSES``), or one of
            "divergence" and "topk_divergence".
        divergence, support, remainder: replace the objective's own, if it is a divergence.
        dtype: of hidden states and head: bf16, fp16 or fp32.
        train_head: whether the head has a gradient.
        reduction: "mean", "sum" or "none".  With "none" and a trained head, backward computes the
            logits again.
        gradient: "dense", "sparse" or "auto", as the losses take it; the memory of "auto" is the
            larger of what "sparse" takes with ``dense_share`` and with dense tokens alone, and its
            traffic that of "sparse".  A renormalised support has a sparse gradient in any case.
        kept: expected number of entries that a token's sparse gradient keeps; None: 64.
        dense_share: expected share of the tokens whose gradient is dense with gradient="sparse"
            or "auto"; None: 0.  A computed loss's certificate has this number and ``kept``.
        masked: share of the tokens that have weight 0, in [0, 1).
        tensor_parallel: number of ranks that share a head.  The plan is for a rank with the most
            rows of it.
        world_size: number of ranks, a multiple of ``tensor_parallel``; None: ``tensor_parallel``.
        device: a PyTorch device, whose free memory is read now, or the name of a card ("H200"),
            whose whole memory counts as free; None: the GPU if there is one, else the CPU.
        free_bytes: free bytes on the device before the hidden states are allocated; None: see
            ``device``.
        rate: FLOP/s of the device's GEMMs, for times; None: the known card's, assumed from its
            data sheet where nobody's measurement is known.
        link: bytes/s that collectives send from one device to the next, for the prediction; None:
            the known card's.
        chunk_size: the loss's argument of that name.

    Raises:
        ValueError: an argument is out of range, or names nothing that is known.

    Examples:
        >>> import fused_sd
        >>> found = fused_sd.plan(hidden_size=4096, vocab=151936, tokens=16384, device="H200")
        >>> for estimate in found.estimates:
        ...     print(f"{estimate.provider}: {estimate.peak_bytes / 2**30:.1f} GiB")
        fused_sd: 4.8 GiB
        eager: 37.2 GiB
    """
    checks.check_bool("train_head", train_head)
    if shared_head is not None:
        checks.check_bool("shared_head", shared_head)
    head = head_size(model, hidden_size, vocab)
    world_size = tensor_parallel if world_size is None else world_size
    checking.check_sizes(tokens, world_size, tensor_parallel, reduction, masked, chunk_size)
    dtype_name = checking.dtype_name(dtype)
    other = head if teacher is None else head_size(teacher, argument="teacher")
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
    is_sparse = gradient != "dense" and not num_entries(chosen)
    implementations = (CERTIFIED[gradient], *IMPLEMENTATIONS) if is_sparse else IMPLEMENTATIONS
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
    runs = certified.runs(work) if is_sparse else fused.runs(work)
    return Plan(
        model=_name(model),
        objective=work.objective.name,
        compared=work.objective.compared,
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
        chunk=runs[0].layout.chunk,
        group=runs[0].layout.group,
        chunked_runs=len(runs),
        kept=kept if is_sparse else None,
        dense_share=work.dense_share,
        rate=found.rates.gemms,
        rate_source=found.rates.source,
        traffic=sends,
        prediction=None if is_sparse else predict(work, sends, found.rates),
        estimates=tuple(
            _estimate(implementation, workload, work, found, num_groups)
            for implementation in implementations
            if implementation.moments(work)
        ),
    )


def _estimate(
    implementation: Implementation,
    workload: Callable[[int], Workload],
    work: Workload,
    device: Device,
    num_groups: int,
) -> Estimate:
    parts = peak(implementation.moments(work))
    rate = device.rates.gemms
    return Estimate(
        provider=implementation.name,
        peak_bytes=total(parts),
        parts=parts,
        fits=_needed_bytes(implementation, work) <= device.free_bytes,
        longest_tokens=num_groups * _longest(implementation, workload, device.free_bytes),
        seconds=None if rate is None else implementation.gemms(work) / rate,
        seconds_source="" if rate is None else FLOOR,
        source=implementation.source,
    )


def _needed_bytes(implementation: Implementation, work: Workload) -> int:
    """Bytes of the inputs that grow with the tokens, and of the peak beyond them."""
    return work.inputs_bytes + total(peak(implementation.moments(work)))


def _longest(
    implementation: Implementation, workload: Callable[[int], Workload], free_bytes: int
) -> int:
    """Largest number of a rank's tokens whose inputs and peak fit, by bisection; 0: not one."""
    low, high = 0, 1
    while high <= MAX_TOKENS and _needed_bytes(implementation, workload(high)) <= free_bytes:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        if _needed_bytes(implementation, workload(middle)) <= free_bytes:
            low = middle
        else:
            high = middle
    return low


def _name(model: Model | None) -> str:
    """How the plan's table names the model."""
    if isinstance(model, str | PathLike):
        return str(model)
    return "a head" if model is None else "a configuration"
