"""Small losses on real ranks that share a head, with their memory and their collectives counted.

Every case runs in processes of a gloo group on a CPU.  Memory is PyTorch's allocations, counted as
in ``fused_sd.bench``: by the calling thread.  gloo's thread lets go of a tensor a little after its
collective has returned; a tensor that it releases last would be counted as held for ever.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor

import fused_sd
from fused_sd.bench.measure import peak_bytes
from fused_sd.bench.problem import Problem, Shape, make_problem, variant
from fused_sd.head.lm_head import LMHead
from fused_sd.losses.log_probs import TokenLogProbs
from fused_sd.losses.output import LossOutput
from fused_sd.planning import Plan
from fused_sd.planning.wire import GATHER, MAX, SUM, SUM_OF_DHIDDEN

WIDE = Shape("wide", 32, 12000)
DEEP = Shape("deep", 256, 3001)  # dW is most of its memory, and one shard has a row less
NUM_TOKENS = 96
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class Case(NamedTuple):
    """A loss and its settings, by the names that ``fused_sd.plan`` uses."""

    objective: str
    shape: Shape = WIDE
    dtype: str = "bf16"
    trained: bool = True
    reduction: str = "mean"
    masked: float = 0.0
    chunk_size: int | None = 20
    gradient: str = "dense"

    def __str__(self) -> str:
        """Name the loss and the head, then every setting that is not the default."""
        words = [self.objective, self.shape.name, self.dtype]
        words += [] if self.trained else ["frozen"]
        words += [] if self.reduction == "mean" else [self.reduction]
        words += [f"{self.masked:.0%} masked"] if self.masked else []
        words += [] if self.gradient == "dense" else [self.gradient]
        return ", ".join(words)


CASES = (
    Case("reverse_kl"),
    Case("reverse_kl", trained=False, reduction="none", masked=0.5),
    Case("gkd", DEEP),
    Case("gkd", dtype="fp32", reduction="none"),
    Case("sdpo"),
    Case("sdpo", DEEP, "fp32", masked=0.5),
    Case("sd_zero"),
    Case("sd_zero", DEEP, "fp32", reduction="none", masked=0.5),
    Case("topk_divergence"),
    Case("cross_entropy", DEEP),
    Case("cross_entropy", dtype="fp32", trained=False, masked=0.5),
    Case("rlsd"),
    Case("rlsd", DEEP, chunk_size=None),
    Case("token_log_probs"),
    Case("reverse_kl", gradient="sparse"),
    Case("sdpo", dtype="fp32", reduction="none", masked=0.5, gradient="sparse"),
)
ENTROPY, TOLERANCE = 0.6, 2**-8  # of the sparse cases: with them no row is dense


class Counted(NamedTuple):
    """One rank's memory and traffic in one case."""

    peak_bytes: int
    sent: dict[str, int]  # bytes by collective; dH's sum counts as a SUM
    num_collectives: int
    kept: float | None  # sparse values of a token


def count(ranks: int, folder: Path, cases: Sequence[Case] = CASES) -> list[list[Counted]]:
    """Run the cases; return for each case the counts of all ranks."""
    torch.multiprocessing.spawn(_rank, (ranks, folder, tuple(cases)), nprocs=ranks)
    by_rank = [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(ranks)]
    return [list(found) for found in zip(*by_rank, strict=True)]


def planned(case: Case, ranks: int, kept: int | None = None) -> Plan:
    """Plan a case.

    Args:
        case: The case.
        ranks: The number of ranks that share the head.
        kept: Sparse values of a token on all ranks together.
    """
    return fused_sd.plan(
        tokens=NUM_TOKENS,
        hidden_size=case.shape.hidden_size,
        vocab=case.shape.vocab,
        objective=case.objective,
        dtype=case.dtype,
        train_head=case.trained,
        reduction=case.reduction,
        masked=case.masked,
        gradient=case.gradient,
        kept=kept,
        tensor_parallel=ranks,
        device="cpu",
        chunk_size=case.chunk_size,
    )


def planned_sums(plan: Plan) -> dict[str, int]:
    """Return the planned bytes by the collective that is called."""
    assert plan.traffic is not None
    payload = dict(plan.traffic.payload)
    payload[SUM] += payload.pop(SUM_OF_DHIDDEN)
    return payload


def kept_together(by_rank: Sequence[Counted]) -> int | None:
    """Return the sparse values of a token on all ranks together."""
    kept = [counted.kept for counted in by_rank if counted.kept is not None]
    return round(sum(kept)) if kept else None


def loss_of(
    case: Case, problem: Problem, head: LMHead, group: dist.ProcessGroup
) -> Callable[[], LossOutput | TokenLogProbs]:
    """Return a function that computes a case's loss on one rank's rows of the head."""
    run: dict[str, Any] = {"process_group": group, "chunk_size": case.chunk_size}
    run |= {"token_weights": problem.mask.float()}
    if case.objective != "token_log_probs":
        run["reduction"] = case.reduction
    if case.gradient == "sparse":
        run |= {"gradient": "sparse", "tolerance": TOLERANCE}
    tokens = problem.hidden, head, problem.token_ids
    frozen = LMHead(head.weight.detach(), shard_sizes=head.shard_sizes)
    teacher = problem.teacher_hidden, frozen
    states = dict(zip(("teacher_hidden", "teacher_head"), teacher, strict=True))
    sides = problem.hidden, head, *teacher
    entries = torch.arange(NUM_TOKENS * 32).view(NUM_TOKENS, 32) % case.shape.vocab
    entry_log_probs = torch.full(entries.shape, 1 / 40).log()
    old = {"old_log_probs": problem.old_log_probs}
    losses: dict[str, Callable[[], LossOutput | TokenLogProbs]] = {
        "reverse_kl": lambda: fused_sd.divergence_loss(*sides, **run),
        "gkd": lambda: fused_sd.gkd_loss(*sides, **run),
        "sdpo": lambda: fused_sd.sdpo_loss(*sides, **run),
        "sd_zero": lambda: fused_sd.sd_zero_loss(*sides, **run),
        "topk_divergence": lambda: fused_sd.topk_divergence_loss(
            problem.hidden, head, entries, entry_log_probs, **run
        ),
        "rlsd": lambda: fused_sd.rlsd_loss(
            *tokens,
            problem.advantages,
            **states,
            **old,
            **run,
        ),
        "cross_entropy": lambda: fused_sd.cross_entropy_loss(*tokens, **run),
        "token_log_probs": lambda: fused_sd.token_log_probs(*tokens, **run),
    }
    return losses[case.objective]


def _rank(rank: int, ranks: int, folder: Path, cases: Sequence[Case]) -> None:
    """Run and count every case as one of the ranks."""
    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=ranks)
    group = dist.group.WORLD
    assert group is not None
    counts = []
    for case in cases:
        problem = variant(
            _drawn(case.shape, case.dtype, case.gradient),
            trainable=case.trained,
            mask_share=case.masked,
        )
        rows = -(-case.shape.vocab // ranks)
        sizes = tuple(min(rows, case.shape.vocab - rows * r) for r in range(ranks))
        shard = problem.weight.detach()[rows * rank : rows * rank + sizes[rank]].clone()
        head = LMHead(shard.requires_grad_(case.trained), shard_sizes=sizes)
        loss = loss_of(case, problem, head, group)
        kept = _kept(loss(), problem.mask) if case.gradient == "sparse" else None
        with _collectives() as calls:
            peak = peak_bytes(lambda loss=loss: loss()[0].sum().backward(), torch.device("cpu"))
        sent = dict.fromkeys((MAX, SUM, GATHER), 0)
        for name, size in calls:
            sent[name] += size
        counts.append(Counted(peak, sent, len(calls), kept))
    torch.save(counts, folder / f"{rank}.pt")
    dist.barrier()  # a rank that leaves early breaks the others' collectives
    dist.destroy_process_group()


@cache
def _drawn(shape: Shape, dtype: str, gradient: str) -> Problem:
    entropy = ENTROPY if gradient == "sparse" else None
    return make_problem(shape, NUM_TOKENS, dtype=DTYPES[dtype], entropy=entropy)


def _kept(output: Any, mask: Tensor) -> float:
    """Return the mean sparse values of a kept token; no row may be dense."""
    assert not output.certificate.dense.any()
    return float(output.certificate.kept[mask].double().mean())


@contextmanager
def _collectives() -> Iterator[list[tuple[str, int]]]:
    """Record the name and the bytes of every collective that this rank calls."""
    calls: list[tuple[str, int]] = []
    reduce, gather = dist.all_reduce, dist.all_gather

    def all_reduce(tensor: Tensor, op: Any = dist.ReduceOp.SUM, **settings: Any) -> Any:
        calls.append((MAX if op == dist.ReduceOp.MAX else SUM, tensor.nbytes))
        with _released([tensor]):
            return reduce(tensor, op, **settings)

    def all_gather(outputs: list[Tensor], tensor: Tensor, **settings: Any) -> Any:
        calls.append((GATHER, tensor.nbytes))
        with _released([tensor, *outputs]):
            return gather(outputs, tensor, **settings)

    with (
        mock.patch.object(dist, "all_reduce", all_reduce),
        mock.patch.object(dist, "all_gather", all_gather),
    ):
        yield calls


@contextmanager
def _released(tensors: Sequence[Tensor]) -> Iterator[None]:
    """Wait at the end until gloo's thread holds no tensor that it did not hold before."""
    held = [tensor._use_count() for tensor in tensors]
    yield
    while any(t._use_count() > count for t, count in zip(tensors, held, strict=True)):
        time.sleep(0)
