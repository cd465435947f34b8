"""One of four processes: every loss on heads that lie on all four, or on two of them.

Dimension key:  N tokens, D hidden size, V vocabulary
"""

import contextlib
import dataclasses
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.distributed as dist
from cases import Case
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard
from vocab_parallel_cases import (
    DIVERGENCES,
    MASS,
    REMAINDERS,
    SUPPORTS,
    Check,
    K,
    Outcome,
    divergence,
    outcome,
    served,
    summed,
)
from vocab_parallel_checks import CHECKS, SECTIONS

import fused_sd
from fused_sd import Comparison, Jsd, LMHead, MixedKl, TeacherTopK
from fused_sd.engine import gradients
from fused_sd.head.vocab_shard import Shards, VocabShard
from fused_sd.terms.support import GivenEntries, named_support

NUM_RANKS = 4
# two ranks do everything; four, who take longer, what may depend on how many they are
OTHER_DIVERGENCES = ("forward_kl", "reverse_kl", "mixed_kl")
FEW_EDGES = ("ties", "a shard", "a short list", "no tokens", "all masked")
ON = {
    "two ranks": tuple(CHECKS),
    "four ranks": tuple(
        name
        for section, checks in SECTIONS.items()
        for name in checks
        if not (section == "matrix" and name.endswith(OTHER_DIVERGENCES))
        if not (section == "edges" and not name.startswith(FEW_EDGES))
    ),
    "even ranks": (*SECTIONS["sampled"], *SECTIONS["named"], *SECTIONS["padded"], "full jsd"),
}
AGAIN = (  # a run of every kind: they repeat to the bit, and go back twice
    *("full jsd", "full forward_kl token_clip", "student tail jsd", "union drop mixed_kl"),
    *("ids renormalize reverse_kl", "entries tail forward_kl", "rlsd", "log-probs and entropy"),
    *("top-k log-probs and tail", "each token, full", "each token, frozen head, full"),
)
PRECISE = (  # beside these, in fp32 and bf16
    *AGAIN,
    *(f"full {name}" for name in DIVERGENCES),
    *("teacher tail mixed_kl", "teacher renormalize forward_kl", "student drop reverse_kl"),
    *("cross entropy", "grpo", "sampled k3", "shaped full", "shaped rlsd", "shaped entropy"),
    *("sdpo", "sd_zero", "opsd", "padded full", "padded tail", "a shard without mass, tail"),
)
ADDING = tuple(name for name in AGAIN if name.startswith(("full", "student", "ids", "rlsd")))
COMPILED = ("student tail jsd", "log-probs and entropy")
SPARSE_WEIGHTS = torch.tensor([0.5, 0.6, 0.7, 0.8, 0.0, 1.1, 1.2, 1.3, 1.4]).double()
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
EQUAL = [  # where both sides sum to 1, a teacher that equals the student has nothing to say
    (name, support, remainder)
    for name in DIVERGENCES
    for support, remainders in {
        "full": ("tail",),
        **dict.fromkeys(("student", "teacher", "union", "ids"), ("tail", "renormalize")),
    }.items()
    for remainder in remainders
]


class Layout(NamedTuple):
    """Which ranks share a head, and how."""

    ranks: tuple[int, ...]
    borders: tuple[int, ...]  # first ids of the shards behind the first
    vocab: int
    is_even: bool = False  # then nobody is told the sizes

    def sizes(self, vocab: int) -> tuple[int, ...]:
        ends = (*self.borders, vocab)
        return tuple(stop - at for at, stop in zip((0, *self.borders), ends, strict=True))


LAYOUTS = {
    "four ranks": Layout((0, 1, 2, 3), (10, 19, 36), 41),
    "two ranks": Layout((0, 1), (23,), 41),
    "even ranks": Layout((2, 3), (20,), 40, is_even=True),
}


class Place(NamedTuple):
    """A rank in a layout."""

    layout: Layout
    rank: int  # in its group
    group: dist.ProcessGroup

    def mine(self, tensor: Tensor | None) -> Tensor | None:
        """A leaf with the rows of a whole head that are this rank's."""
        if tensor is None:
            return None
        return tensor.detach().split(self.layout.sizes(len(tensor)))[self.rank].clone()

    def head(self, weight: Tensor, bias: Tensor | None, case: Case, valid: int | None) -> LMHead:
        sizes = self.layout.sizes(len(weight))
        told = None if self.layout.is_even and len(set(sizes)) == 1 and valid is None else sizes
        shaping = case.logit_scale, case.softcap, valid
        return LMHead(self.mine(weight), self.mine(bias), *shaping, told)

    def heads(self, check: Check, case: Case) -> tuple[LMHead, LMHead]:
        valid = check.teacher_valid or case.valid_vocab
        return (
            self.head(case.weight, case.bias, case, case.valid_vocab),
            self.head(case.teacher_weight, None, case, valid),
        )

    def outcome(
        self, check: Check, dtype: torch.dtype = torch.float64, **how: Any
    ) -> dict[str, Tensor]:
        case = check.case(self.layout.vocab, dtype)
        return outcome(check, case, *self.heads(check, case), process_group=self.group, **how)


def work(rank: int) -> dict[str, Any]:
    """All that this rank found, by the layout's or the scenario's name."""
    places = {}
    for name, layout in LAYOUTS.items():
        group = dist.new_group(list(layout.ranks))
        if rank in layout.ranks:
            places[name] = Place(layout, layout.ranks.index(rank), group)
    lonely = [dist.new_group([each]) for each in range(NUM_RANKS)][rank]
    found: dict[str, Any] = {}
    for name, place in places.items():
        found[name] = {}
        for key in ON[name]:
            with named(f"{key!r} on {name}"):
                found[name][key] = place.outcome(CHECKS[key])
    with named("alone"):
        found["alone"] = alone(lonely)
    place = places.get("two ranks")
    for name, scenario in SCENARIOS.items():
        if place is not None:
            with named(name):
                found[name] = scenario(place)
    with named("tensor and data parallel"):
        found["tensor and data parallel"] = tokens_in_parts(rank, places)
    return found


@contextlib.contextmanager
def named(name: str) -> Iterator[None]:
    """An error says where it happened."""
    try:
        yield
    except Exception as error:
        raise RuntimeError(f"{name}: {error}") from error


def alone(group: dist.ProcessGroup) -> dict[str, Outcome]:
    """A group of one rank, whose head is whole."""
    found = {}
    for name in AGAIN:
        check = CHECKS[name]
        case = check.case(41)
        teacher = LMHead(case.teacher_weight, None, case.logit_scale, case.softcap)
        found[name] = outcome(check, case, case.head, teacher, process_group=group)
    return found


def again(place: Place) -> dict[str, Outcome]:
    return {name: place.outcome(CHECKS[name], again=True) for name in AGAIN}


def in_parts(place: Place) -> dict[str, Outcome]:
    """The hidden states' gradient, which a framework sums."""
    return {name: place.outcome(CHECKS[name], reduce_dhidden=False) for name in AGAIN}


def precise(place: Place) -> dict[tuple[str, str], Outcome]:
    return {
        (name, dtype): place.outcome(CHECKS[name], DTYPES[dtype])
        for name in PRECISE
        for dtype in DTYPES
    }


def equal(place: Place) -> dict[tuple[str, str, str], Outcome]:
    """The teacher is the student."""
    found = {}
    for key in EQUAL:
        check = Check(*divergence(*key))
        case = check.case(place.layout.vocab, torch.float32)
        case.teacher_hidden = case.hidden.detach()
        head, _ = place.heads(check, case)
        found[key] = outcome(check, case, head, head, process_group=place.group)
    return found


def without_grad(place: Place) -> tuple[bool, Tensor, dict[str, int]]:
    """Nothing is formed, and nothing said, for backward."""
    check = CHECKS["full jsd"]
    case = check.case(place.layout.vocab)
    heads = place.heads(check, case)
    with torch.no_grad(), recorded() as said:
        run = {"token_weights": case.token_weights, "process_group": place.group}
        output = check.fused(case, *heads, **run)
    return output.loss.requires_grad, output.loss, total(said)


def sparse(place: Place) -> dict[tuple[str, float], Outcome]:
    """Gradients by the product, kept in entries or not; the head is the identity."""
    found = {}
    for reduction in ("sum", "none"):
        for tolerance in (None, 2**-4, 0.2):
            for vocab, valid in ((41, None), (41, 23)):
                found[reduction, tolerance, valid] = sparse_gradient(
                    place, reduction, tolerance, vocab, valid
                )
        for tolerance in (None, 2**-4):
            found["auto", reduction, tolerance] = sparse_gradient(
                place, reduction, tolerance, 41, None, slice(0, 6), "auto"
            )
    return found


def sparse_gradient(
    place: Place,
    reduction: str,
    tolerance: float | None,
    vocab: int,
    valid: int | None,
    flat: slice = slice(None, None, 3),  # tokens
    gradient: str = "sparse",
) -> Outcome:
    torch.manual_seed(0)
    hidden = 4 * torch.randn(9, vocab, dtype=torch.float64)
    hidden[flat] *= 0.02  # nearly flat: too many entries to keep
    teacher = hidden + 0.3 * torch.randn_like(hidden)
    sizes = place.layout.sizes(vocab)
    rows = place.mine(torch.eye(vocab, dtype=torch.float64))
    head = LMHead(rows.requires_grad_(), valid_vocab=valid, shard_sizes=sizes)
    kind = {} if tolerance is None else {"gradient": gradient, "tolerance": tolerance}
    hidden.requires_grad_()
    with mock.patch.object(gradients, "MOST", 9):
        output = fused_sd.divergence_loss(
            *(hidden, head, teacher, head),
            divergence=fused_sd.Jsd(0.5),
            token_weights=SPARSE_WEIGHTS,
            reduction=reduction,
            chunk_size=3,
            process_group=place.group,
            **kind,
        )
        dhidden, dweight = torch.autograd.grad(output.loss.sum(), [hidden, head.weight])
    found = {"loss": output.loss.detach(), "dhidden": dhidden, "dweight": dweight}
    return found if tolerance is None else found | output.certificate._asdict()


@contextlib.contextmanager
def recorded() -> Iterator[list[tuple[str, int]]]:
    """What is said: the operation, and the bytes that this rank hands over."""
    said: list[tuple[str, int]] = []
    reduce, gather = dist.all_reduce, dist.all_gather

    def all_reduce(tensor: Tensor, op: Any = dist.ReduceOp.SUM, group: Any = None) -> Any:
        name = "MAX" if op == dist.ReduceOp.MAX else "SUM"
        said.append((name, tensor.numel() * tensor.element_size()))
        return reduce(tensor, op, group=group)

    def all_gather(parts: list[Tensor], tensor: Tensor, group: Any = None) -> Any:
        said.append(("all-gather", tensor.numel() * tensor.element_size()))
        return gather(parts, tensor, group=group)

    with mock.patch.multiple(dist, all_reduce=all_reduce, all_gather=all_gather):
        yield said


def total(said: list[tuple[str, int]]) -> dict[str, int]:
    """Bytes by operation, and how many operations they are."""
    found = {"count": len(said)}
    for name, size in said:
        found[name] = found.get(name, 0) + size
    return found


def compared(support: str, remainder: str) -> dict[str, Any]:
    """The JSD on a support, as a plan has it."""
    chosen = GivenEntries(15)
    if support not in ("ids", "entries"):
        chosen = named_support(support, *(K, MASS)[: 2 if support == "teacher_nucleus" else 1])
    return {"comparison": Comparison(Jsd(0.3), chosen, remainder)}


FULL = {"comparison": Comparison(Jsd(0.3), entry_clip=0.05)}
WIRED = {  # checks, and what a plan calls the same
    **{
        f"full {name}": {"comparison": Comparison(known)}
        for name, (known, _) in DIVERGENCES.items()
    },
    "full forward_kl entry_clip": {"comparison": Comparison("forward_kl", entry_clip=0.02)},
    **{
        f"{support} {remainder} jsd": compared(support, remainder)
        for support in SUPPORTS
        for remainder in REMAINDERS
    },
    "cross entropy": {"has_teacher": False},
    "rlsd": {},
    "log-probs": {"has_teacher": False, "is_per_token": True},
    "each token, full": FULL,
    "each token, frozen head, full": FULL,
    "each token, renormalize": {
        "comparison": Comparison(MixedKl(0.4), TeacherTopK(K), "renormalize")
    },
}


def wire(place: Place) -> dict[tuple[str, int], dict[str, int]]:
    """What each loss says, forward and backward, at a vocabulary and at twice as much."""
    found = {}
    for name in WIRED:
        for vocab in (46, 92):
            check = dataclasses.replace(CHECKS[name], problem={"vocab": vocab})
            even = place._replace(layout=place.layout._replace(borders=(vocab // 2,)))
            with recorded() as said:
                even.outcome(check, torch.float32)
            found[name, vocab] = total(said)
    return found


def refusals(place: Place) -> dict[str, str]:
    """The messages that this rank gets for what cannot be meant."""
    check = CHECKS["full jsd"]
    case = check.case(place.layout.vocab)
    right, teacher = place.heads(check, case)
    weight, sizes = right.weight, (23, 18)
    hidden = case.hidden
    even = torch.randn(20, hidden.shape[1], dtype=torch.float64)

    def call(head: Any = right, other: Any = teacher, group: Any = place.group, **settings: Any):
        sides = hidden, head, case.teacher_hidden, other
        return fused_sd.divergence_loss(*sides, process_group=group, reduction="sum", **settings)

    def uneven_beside_even() -> None:
        call(even, even)
        call(even, torch.cat([even, even[: place.rank]]))

    calls: dict[str, Callable[[], Any]] = {
        "too many sizes": lambda: call(LMHead(weight, shard_sizes=(23, 9, 9))),
        "another size": lambda: call(LMHead(weight, shard_sizes=(18, 23))),
        "nobody was told the sizes": lambda: call(weight),
        "only the teacher's differ": uneven_beside_even,
        "sizes without a group": lambda: call(group=None),
        "sizes without a group, log-probs": lambda: fused_sd.token_log_probs(
            hidden, right, case.token_ids
        ),
        "teacher cut elsewhere": lambda: call(
            other=LMHead(weight[:18].detach(), shard_sizes=(18, 18)), divergence=fused_sd.Jsd(0.5)
        ),
        "nothing: sizes in a list": lambda: call(
            other=LMHead(teacher.weight, shard_sizes=list(sizes))
        ),
        "the group's name": lambda: call(group="tp"),
        "the group's name, log-probs": lambda: fused_sd.entry_log_probs(
            hidden, right, 3, process_group="tp"
        ),
        "a group of others": lambda: call(group=dist.GroupMember.NON_GROUP_MEMBER),
        "a DTensor": lambda: call(
            DTensor.from_local(even.detach(), DeviceMesh.from_group(place.group, "cpu"), [Shard(0)])
        ),
        "more entries than there are": lambda: call(support=fused_sd.StudentTopK(42)),
        "more log-probs than there are": lambda: fused_sd.entry_log_probs(
            hidden, right, 42, process_group=place.group
        ),
        "an id behind the last": lambda: fused_sd.cross_entropy_loss(
            hidden, right, case.token_ids + 41, process_group=place.group, reduction="sum"
        ),
        "more tokens than rows": lambda: LMHead(weight, valid_vocab=42, shard_sizes=sizes),
        "more tokens than rows here": lambda: LMHead(weight, valid_vocab=41),
        "a tail of a served id behind the last": lambda: fused_sd.topk_divergence_loss(
            hidden,
            right,
            served(case)[0] + 2,
            served(case)[1],
            process_group=place.group,
            reduction="sum",
        ),
    }
    return {name: message(call) for name, call in calls.items()}


def message(call: Callable[[], Any]) -> str:
    try:
        call()
    except (ValueError, TypeError, AttributeError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def compiled(place: Place) -> dict[str, list[list[Tensor]]]:
    return {name: compiled_and_not(place, CHECKS[name]) for name in COMPILED}


def compiled_and_not(place: Place, check: Check) -> list[list[Tensor]]:
    """Loss and gradients of a whole graph, and of what it is compiled of."""
    case = check.case(place.layout.vocab)
    student, teacher = place.heads(check, case)
    run = {"process_group": place.group, "token_weights": case.token_weights}

    def step(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        moved = dataclasses.replace(case, hidden=hidden * 2)
        head = dataclasses.replace(student, weight=weight, bias=bias)
        return check.fused(moved, head, teacher, **run).loss * 3

    inputs = case.hidden, student.weight.requires_grad_(), student.bias.requires_grad_()
    torch._dynamo.reset()
    found = []
    for function in (torch.compile(step, fullgraph=True, backend="aot_eager"), step):
        loss = function(*inputs)
        found.append([loss.detach(), *torch.autograd.grad(loss, inputs)])
    return found


def tokens_in_parts(rank: int, places: dict[str, Place]) -> dict[str, Outcome]:
    """Two pairs share the tokens, the ranks of a pair the head; and four ranks the tokens alone."""
    found = {}
    pair = next(place for name, place in places.items() if name != "four ranks")
    pair = pair._replace(layout=LAYOUTS["two ranks"])
    for name in ADDING:
        check = adding(name)
        case = check.case(41)
        half = some_tokens(case, (0, 4, 7)[rank // 2 :][:2])
        heads = pair.heads(check, case)
        found[f"pairs, {name}"] = outcome(check, half, *heads, process_group=pair.group)
        # one rank has nothing but a token that does not count, another nothing at all
        few = some_tokens(case, (0, 4, 5, 7, 7)[rank:][:2])
        teacher = LMHead(case.teacher_weight, None, case.logit_scale, case.softcap)
        found[f"tokens, {name}"] = outcome(check, few, case.head, teacher)
    return found


def adding(name: str) -> Check:
    """A check whose loss is a sum over the tokens."""
    return dataclasses.replace(CHECKS[name], run={"reduction": "sum"}, weighting=summed)


def some_tokens(case: Case, bounds: tuple[int, int]) -> Case:
    names = ("hidden", "teacher_hidden", "token_ids", "old_log_probs", "token_weights")
    rows = {name: getattr(case, name).detach()[slice(*bounds)] for name in names}
    return dataclasses.replace(case, **rows)


def kernels_work(rank: int) -> dict[str, Any]:
    """One of two processes whose row functions are Triton's."""
    place = Place(LAYOUTS["two ranks"], rank, dist.group.WORLD)
    found: dict[str, Any] = {"checks": {}, "normalizers": {}}
    with warnings.catch_warnings():
        # the interpreter computes both branches of a select in numpy, which warns of inf - inf
        warnings.simplefilter("ignore", RuntimeWarning)
        for name in WITH_KERNELS:
            with named(name):
                found["checks"][name] = place.outcome(CHECKS[name], torch.float32, backend="triton")
        for name, (sides, sizes) in rows_in_shards().items():
            shards = Shards(place.group.group_name, rank, sizes, True)
            mine = (columns_of(side, sizes, rank) for side in sides)
            joined = kernel_rows().normalizers(*mine, VocabShard(shards, max(sizes)))
            found["normalizers"][name] = joined._replace(shard=None)  # a group cannot be sent
    return found


def kernel_rows() -> Any:
    """Imported where it is used: it needs Triton."""
    from fused_sd.kernels import rows

    return rows


def rows_in_shards() -> dict[str, tuple[tuple[Tensor, Tensor], tuple[int, ...]]]:
    """Logits of both sides, and how many columns each of two ranks has."""
    torch.manual_seed(0)
    student = 4 * torch.randn(5, 40)
    teacher = student + torch.randn(5, 40)
    lonely, cut = student.clone(), teacher.clone()
    lonely[:, :25] = -1e4  # next to no mass on one rank
    lonely[2:, :25] = cut[2:, :25] = -torch.inf  # and none at all
    far = student.clone()
    far[0], far[1, 30] = -2e4, 3e4
    return {
        "even": ((student, teacher), (20, 20)),
        "a rank without columns": ((student, teacher), (40, 0)),
        "a rank without mass": ((lonely, cut), (25, 15)),
        "far away": ((far, teacher), (13, 27)),
    }


def columns_of(logits: Tensor, sizes: tuple[int, ...], rank: int) -> Tensor:
    """A rank's columns, in a workspace as wide as everybody's."""
    padded = logits.new_full((len(logits), max(sizes)), -torch.inf)
    mine = logits.split(sizes, 1)[rank]
    padded[:, : mine.shape[1]] = mine
    return padded


WITH_KERNELS = (
    *("full forward_kl", "full reverse_kl", "full jsd", "full forward_kl entry_clip"),
    *("full reverse_kl token_clip", "student tail jsd", "union drop mixed_kl", "ties, union"),
    *("ids renormalize reverse_kl", "entries tail forward_kl", "rlsd", "log-probs and entropy"),
    *("top-k log-probs and tail", "metrics of a full support", "padded tail"),
    *("padded log-probs and entropy", "a shard without mass, full", "each token, full"),
    *("no tokens, full", "garbage, full", "log-probs and entropy beside jsd"),
)
SCENARIOS: dict[str, Callable[[Place], Any]] = {
    "again": again,
    "in parts": in_parts,
    "precise": precise,
    "equal": equal,
    "without grad": without_grad,
    "sparse": sparse,
    "wire": wire,
    "refusals": refusals,
    "compiled": compiled,
}
