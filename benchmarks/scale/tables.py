"""The tables of ``docs/scale.md``: ``fused_sd.plan`` gives every number of a large head."""

from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any

import fused_sd
from benchmarks.markdown import line, ruler
from benchmarks.scale import cases
from fused_sd.measuring.head_sizes import head_size
from fused_sd.planning import Plan
from fused_sd.planning.devices import CARDS
from fused_sd.planning.objectives import OBJECTIVES
from fused_sd.planning.prediction import Prediction
from fused_sd.planning.wire import wire

TOKENS = 131072
CARD = "H200"
RANKS = (1, 2, 4, 8)
SHARING = RANKS[1:]
MODELS = ("Qwen/Qwen3-8B", "Qwen/Qwen3-32B", "Qwen/Qwen3-235B-A22B")
HEADS = {MODELS[0]: "8B and 235B-A22B", MODELS[1]: "32B"}
LOSSES = {
    "reverse_kl": "KL, whole vocabulary",
    "gkd": "JSD, whole vocabulary",
    "sdpo": "SDPO: student's top 100 and a tail",
    "topk_divergence": "a server's top 32 and a tail",
    "sd_zero": "SD-Zero: teacher's top 64, renormalised",
    "rlsd": "RLSD: policy with a teacher's states",
    "cross_entropy": "cross entropy, GRPO",
}
DETAILED = (MODELS[0], "reverse_kl")  # the model and loss of the detailed tables
LINKS = {"NVLink 4": 370e9, "NVLink 3": 208e9, "PCIe 5": 40e9}
GIB, MIB = 2**30, 2**20


@cache
def planned(
    model: str,
    loss: str,
    ranks: int,
    link: float | None = None,
    batches: int = 1,
    reduction: str = "mean",
) -> Plan:
    """Plan a loss of a model on ``CARD``."""
    return fused_sd.plan(
        model,
        tokens=TOKENS,
        objective=loss,
        reduction=reduction,
        tensor_parallel=ranks,
        world_size=ranks * batches,
        device=CARD,
        link=link,
    )


def predicted(
    model: str, loss: str, ranks: int, link: float | None = None, batches: int = 1
) -> Prediction:
    """Return the plan's predicted time."""
    found = planned(model, loss, ranks, link, batches).prediction
    assert found is not None
    return found


def _share(time: Prediction) -> str:
    return f"{(time.wire + time.latency) / time.total:.0%}"


def _headings(*texts: str) -> Iterator[str]:
    yield line(texts)
    yield ruler(1, len(texts))


def _by_ranks(name: str) -> Iterator[str]:
    yield from _headings(name, *map(str, RANKS))


def head_lines() -> Iterator[str]:
    """Sizes of the heads and of the inputs that every rank holds."""
    rows = [f"rows at {ranks}" for ranks in SHARING]
    yield from _headings("model", "hidden", "vocabulary", *rows, "head", "at 8", "states")
    for model in MODELS:
        size = head_size(model)
        shards = [-(-size.vocab // ranks) for ranks in SHARING]
        row_bytes = 2 * size.hidden_size
        sizes = [row_bytes * count / GIB for count in (size.vocab, shards[-1], TOKENS)]
        texts = [*map(str, (*size, *shards)), *(f"{gib:.2f} GiB" for gib in sizes)]
        yield line([model.partition("/")[2], *texts])


def memory_lines() -> Iterator[str]:
    """Peak memory by loss and ranks, and that of peers that hold the logits."""
    for model, name in HEADS.items():
        holding = [f"holding logits, at {ranks}" for ranks in (RANKS[0], RANKS[-1])]
        yield from _headings(f"{name}: peak in GiB", *map(str, RANKS), *holding)
        for loss, title in LOSSES.items():
            plans = [planned(model, loss, ranks) for ranks in RANKS]
            peaks = [f"{plan.peak_bytes / GIB:.2f}" for plan in plans]
            theirs = [f"{plan['eager'].peak_bytes / GIB:.0f}" for plan in (plans[0], plans[-1])]
            yield line([title, *peaks, *theirs])
        yield ""


def part_lines() -> Iterator[str]:
    """The parts of one loss's peak memory."""
    plans = [planned(*DETAILED, ranks) for ranks in RANKS]
    names = {name: None for plan in plans for name in plan.estimates[0].parts}
    yield from _by_ranks(f"{HEADS[DETAILED[0]]}, {LOSSES[DETAILED[1]]}: GiB at the peak")
    for name in names:
        parts = [plan.estimates[0].parts.get(name, 0) for plan in plans]
        yield line([name, *(f"{size / GIB:.2f}" if size else "" for size in parts)])
    yield line(["all", *(f"{plan.peak_bytes / GIB:.2f}" for plan in plans)])
    yield line(["tokens in a chunk", *(str(plan.chunk) for plan in plans)])
    for provider, title in (("fused_sd", "here"), ("eager", "holding logits")):
        longest = [plan[provider].longest_tokens // 1000 for plan in plans]
        yield line([f"longest batch in thousands of tokens, {title}", *map(str, longest)])


def number_lines() -> Iterator[str]:
    """fp32 numbers that a rank sends for a token, by loss."""
    kinds = ("MAX", "SUM", "all-gather", "collectives of a chunk")
    yield from _headings("numbers of a token", *kinds)
    shard = -(-head_size(MODELS[0]).vocab // RANKS[-1])
    for loss, title in LOSSES.items():
        sends = wire(OBJECTIVES[loss], 0, shard, "cuda")
        numbers = sends.max_numbers, sends.sum_numbers, sends.gathered_numbers
        yield line([title, *map(str, (*numbers, sends.maxes + sends.sums + sends.gathers))])


def wire_lines() -> Iterator[str]:
    """Bytes that a rank sends in a step, by loss and ranks."""
    for model, name in HEADS.items():
        kinds = ("MAX", "SUM", "all-gather", "SUM of dH")
        sent = [f"sent at {ranks}" for ranks in SHARING]
        yield from _headings(f"{name}: MiB in collectives", *kinds, *sent)
        for loss, title in LOSSES.items():
            found = [planned(model, loss, ranks).traffic for ranks in SHARING]
            sends = [each for each in found if each is not None]
            sizes = [*sends[-1].payload.values(), *(each.sent_bytes for each in sends)]
            yield line([title, *(f"{size / MIB:.1f}" if size else "" for size in sizes)])
        yield ""


def time_lines() -> Iterator[str]:
    """Predicted milliseconds by loss and ranks."""
    for model, name in HEADS.items():
        texts = ("speedup of 8 ranks", "communication at 8")
        yield from _headings(f"{name}: ms predicted", *map(str, RANKS), *texts)
        for loss, title in LOSSES.items():
            times = [predicted(model, loss, ranks) for ranks in RANKS]
            gain = f"{times[0].total / times[-1].total:.1f} x"
            totals = [f"{1e3 * time.total:.0f}" for time in times]
            yield line([title, *totals, gain, _share(times[-1])])
        yield ""


def time_part_lines() -> Iterator[str]:
    """The parts of one loss's predicted time."""
    times = [predicted(*DETAILED, ranks) for ranks in RANKS]
    yield from _by_ranks(f"{HEADS[DETAILED[0]]}, {LOSSES[DETAILED[1]]}: ms predicted")
    for name, title in {
        "gemms": "GEMMs",
        "rows": "passes over the logits",
        "rounding": "rounding dH and dW",
        "wire": "transfer",
        "latency": "latency of the collectives",
    }.items():
        yield line([title, *(f"{1e3 * getattr(time, name):.1f}" for time in times)])
    yield line(["all", *(f"{1e3 * time.total:.1f}" for time in times)])
    plans = [planned(*DETAILED, ranks) for ranks in RANKS]
    yield line(
        ["not included: dW's sum, if nothing hides it", *(f"{_sum_ms(p):.1f}" for p in plans)]
    )


def _sum_ms(plan: Plan) -> float:
    """Milliseconds to read and write the fp32 sum of dW once for each group of chunks."""
    copies = CARDS[CARD].bandwidth
    groups = -(-plan.active_per_rank // plan.group)
    return 1e3 * groups * 8 * plan.shard_rows * plan.hidden_size / copies


def link_lines() -> Iterator[str]:
    """Predicted milliseconds over slower links."""
    texts = ("GB/s", *map(str, RANKS), "communication at 8")
    yield from _headings(f"{HEADS[MODELS[0]]}: ms predicted, by link", *texts)
    for loss in ("reverse_kl", "sd_zero"):
        for name, link in LINKS.items():
            times = [predicted(MODELS[0], loss, ranks, link) for ranks in RANKS]
            totals = [f"{1e3 * time.total:.0f}" for time in times]
            cells = [f"{link / 1e9:.0f}", *totals, _share(times[-1])]
            yield line([f"{LOSSES[loss]}; {name}", *cells])


def way_lines() -> Iterator[str]:
    """Memory, time and traffic of eight ranks that share a head or split the batch."""
    texts = ("tokens of a rank", "head and peak, GiB", "ms predicted", "MiB sent")
    yield from _headings("8 ranks, one loss", *texts)
    for ranks in RANKS:
        batches = RANKS[-1] // ranks
        plan = planned(*DETAILED, ranks, batches=batches)
        held = (plan.peak_bytes + 2 * plan.shard_rows * plan.hidden_size) / GIB
        time = predicted(*DETAILED, ranks, batches=batches)
        sent = plan.traffic.sent_bytes / MIB if plan.traffic else 0
        name = f"{batches} x {ranks}: a head on {ranks}"
        texts = (str(plan.tokens_per_rank), f"{held:.2f}", f"{1e3 * time.total:.0f}", f"{sent:.0f}")
        yield line([name, *texts])


def counted_lines(counts: Mapping[str, Any]) -> Iterator[str]:
    """Planned beside counted memory and traffic, by case and ranks."""
    peaks = ("peak planned", "peak counted", "error")
    sent = ("bytes planned", "bytes counted", "collectives")
    yield from _headings("case", "ranks", *peaks, *sent)
    for row in counts["cases"]:
        plan = planned_again(row)
        assert plan.traffic is not None
        gap = f"{plan.peak_bytes / row['peak'] - 1:+.1%}"
        peaks = (str(plan.peak_bytes), str(row["peak"]), gap)
        calls = plan.traffic.num_collectives, row["collectives"]
        text = str(calls[0]) if calls[0] == calls[1] else "{} planned, {} counted".format(*calls)
        sent = (str(plan.traffic.payload_bytes), str(sum(row["sent"].values())), text)
        yield line([row["case"], str(row["ranks"]), *peaks, *sent])


def planned_again(row: Mapping[str, Any]) -> Plan:
    """Return the plan of a counted case."""
    return _planned_again(row["case"], row["ranks"], row["kept"])


@cache
def _planned_again(name: str, ranks: int, kept: int | None) -> Plan:
    by_name = {str(case): case for case in cases.CASES}
    return cases.planned(by_name[name], ranks, kept)
