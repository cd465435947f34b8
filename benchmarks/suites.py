"""The suites: which cells each part measures, and how long each cell is expected to take.

A part varies one setting at a time: a full grid would take hours.  Providers that compile for
tens of seconds have a part of their own, the last one.
"""

from typing import Any, NamedTuple

import torch

from fused_sd.bench.floor import FLOOR_RUNS, products
from fused_sd.bench.measure import Effort
from fused_sd.bench.problem import MEAN_KL, OBJECTIVES, SHAPES
from fused_sd.bench.providers import PROVIDERS
from fused_sd.planning.devices import CARDS

SPARSE, LOOSE, TIGHT = "fused_sd, sparse", "fused_sd, sparse 2^-6", "fused_sd, sparse 2^-10"
EVERY = tuple(provider.name for provider in PROVIDERS if provider.name not in (LOOSE, TIGHT))
COMPILING = ("torch.compile", "Liger chunked JSD, compiled")
FP32 = "eager, fp32 logits"  # an order of magnitude slower on a GPU: measured once
QUICK = tuple(name for name in EVERY if name not in (*COMPILING, FP32))
CHUNKED = ("fused_sd", "eager", "TRL chunked divergence", "Liger fused_linear_jsd")
SAMPLED = (
    "fused_sd",
    "eager",
    "TRL chunked log-probs",
    "verl triton",
    "Liger scaled cross entropy",
)
MEASURED = tuple(name for name in OBJECTIVES if name != "opsd")  # it is forward_kl and a clamp
ON_CPU = ("fused_sd", "eager", "TRL chunked divergence", "TRL chunked log-probs")


class CellRequest(NamedTuple):
    """A cell to measure: one problem and the providers that are compared on it."""

    shape: str
    tokens: int
    objective: str
    providers: tuple[str, ...] = EVERY
    trainable: bool = True
    mask_share: float = 0.0
    kl: float = MEAN_KL
    dtype: str = "bfloat16"
    timed: bool = True
    entropy: float | None = None  # in nat; None: whatever the default operands have

    @property
    def key(self) -> str:
        """The cell's name in the results."""
        parts = [self.shape, str(self.tokens), self.objective, self.dtype]
        parts += [] if self.trainable else ["frozen"]
        parts += [f"mask {self.mask_share:g}"] if self.mask_share else []
        parts += [f"KL {self.kl:g}"] if self.kl != MEAN_KL else []
        parts += [] if self.entropy is None else [f"entropy {self.entropy:g}"]
        return ", ".join(parts if self.timed else [*parts, "errors"])


class Suite(NamedTuple):
    """Parts in the order in which they run, and the effort that goes into each cell."""

    parts: dict[str, list[CellRequest]]
    effort: Effort
    floor_warm_seconds: float
    minutes: float  # for all parts
    provider_seconds: float | None = None  # for one provider in one cell; None: no limit


def _sparse(shape: str, tokens: int, **others: Any) -> list[CellRequest]:
    """Return cells for sparse gradients, at the entropies of policies from sharp to soft."""

    def cell(objective: str, entropy: float, *providers: str) -> CellRequest:
        names = ("fused_sd", *providers)
        return CellRequest(shape, tokens, objective, names, entropy=entropy)._replace(**others)

    return [
        cell("reverse_kl", 0.3, SPARSE),
        cell("reverse_kl", 0.6, SPARSE, LOOSE, TIGHT),
        cell("reverse_kl", 1.3, SPARSE),
        cell("topk_renormalized", 0.6, "eager"),
        cell("topk_tail", 0.6, SPARSE),
    ]


def _gpu() -> Suite:
    big = "qwen3-8b"
    parts = {
        "main": [
            CellRequest(big, 16384, "reverse_kl", QUICK),
            CellRequest(big, 16384, "jsd", QUICK),
            CellRequest(big, 4096, "reverse_kl", (*QUICK, FP32)),
        ],
        "sparse": _sparse(big, 16384),
        "frozen": [
            CellRequest(big, 16384, "reverse_kl", CHUNKED, trainable=False),
            CellRequest(big, 16384, "reverse_kl", CHUNKED, mask_share=0.5),
        ],
        "objectives": [
            CellRequest(big, 4096, objective, QUICK)
            for objective in MEASURED
            if objective not in ("reverse_kl", "jsd")
        ],
        "scaling": [CellRequest(big, tokens, "reverse_kl", CHUNKED) for tokens in (1024, 65536)],
        "rlsd": [CellRequest(big, 16384, "rlsd", SAMPLED)],
        "shapes": [
            CellRequest(shape, 16384, "reverse_kl", CHUNKED)
            for shape in ("qwen3-4b", "olmo-3-7b", "llama-3-8b", "qwen3.5-35b-a3b")
        ],
        "accuracy": [
            CellRequest("qwen3-4b", 512, objective, QUICK, kl=kl, timed=False)
            for kl in (1e-3, 1e-2, 1e-1)
            for objective in ("reverse_kl", "topk_tail")
        ],
        "compiled": [CellRequest(big, 16384, "reverse_kl", ("fused_sd", *COMPILING))],
    }
    # 20 runs of whatever takes less than 95 ms, and never fewer than 5
    return Suite(parts, Effort(0.5, 20, 1.9, 5), 2.0, 9.0, provider_seconds=25.0)


def _cpu() -> Suite:
    def cell(shape: str, tokens: int, objective: str, **others: Any) -> CellRequest:
        return CellRequest(shape, tokens, objective, ON_CPU, dtype="float32")._replace(**others)

    parts = {
        "main": [
            cell("wide", 128, "reverse_kl"),
            cell("wide", 128, "jsd"),
        ],
        "sparse": _sparse("deep", 256, dtype="float32"),
        "frozen": [
            cell("small", 128, "reverse_kl", trainable=False),
            cell("small", 128, "reverse_kl", mask_share=0.5),
        ],
        "objectives": [cell("small", 128, objective) for objective in MEASURED],
        "scaling": [
            cell("wide", 32, "reverse_kl"),
            cell("wide", 512, "reverse_kl"),
            cell("wide", 1024, "reverse_kl", providers=("fused_sd", "eager")),
        ],
        "accuracy": [
            CellRequest("small", 64, objective, QUICK, kl=kl, timed=False)
            for kl in (1e-3, 1e-2, 1e-1)
            for objective in ("reverse_kl", "topk_tail")
        ],
        "compiled": [cell("wide", 128, "reverse_kl", providers=("fused_sd", "torch.compile"))],
    }
    return Suite(parts, Effort(0.0, 5, 8.0, 3), 0.0, 20.0)


SUITES = {"gpu": _gpu(), "cpu": _cpu()}

# A provider's expected time over the time of the bare GEMMs.  It follows from what each computes
# besides (benchmarks/PEERS.md): fp32 GEMMs, further projections, passes over whole logits.
FACTORS = {
    **dict.fromkeys(("fused_sd", SPARSE, LOOSE, TIGHT), 1.2),
    "eager": 3.5,
    FP32: 16.0,
    "torch.compile": 2.0,
    "TRL chunked divergence": 2.5,
    "TRL chunked log-probs": 4.0,
    "Liger fused_linear_jsd": 2.5,
    "Liger fused_linear_grpo": 10.0,
    "fla fused_kl_div": 5.0,
}
OTHER_FACTOR = 3.0
COMPILE_SECONDS = 20.0
HOLDS_LOGITS = ("eager", FP32, "torch.compile", "TRL SDPO")  # of all tokens
GPU_FLOPS, CPU_FLOPS = 6.0e14, 6.0e10  # sustained; for the CPU on one busy core
SETUP_SECONDS = {"gpu": 0.7, "cpu": 4.0}  # drawing the operands, and float64
CHECK_SECONDS = {"gpu": 0.3, "cpu": 1.0}  # a provider's comparison and first run


def gpu_memory() -> float:
    """Return the bytes of this machine's GPU; where there is none, of an H200."""
    if torch.cuda.is_available():
        return float(torch.cuda.get_device_properties(0).total_memory)
    return CARDS["H200"].memory


def expected_seconds(request: CellRequest, suite: str) -> float:
    """Return a cell's time if every provider is installed; who cannot fit the GPU takes none."""
    effort = SUITES[suite].effort
    shape = SHAPES[request.shape]
    flop = 2 * request.tokens * (1 - request.mask_share) * shape.hidden_size * shape.vocab
    rate = GPU_FLOPS if suite == "gpu" else CPU_FLOPS
    once = flop * products(request.objective, request.trainable).u / rate
    total = SETUP_SECONDS[suite]
    if request.timed:
        kinds = (
            1 if request.dtype == "float32" else 2
        )  # fp32 logits, and 16-bit ones: the floor runs both
        total += SUITES[suite].floor_warm_seconds + kinds * min(effort.runs, FLOOR_RUNS) * once
    for provider in PROVIDERS:
        if provider.name not in request.providers or request.objective not in provider.objectives:
            continue
        if suite == "cpu" and provider.needs_gpu:
            continue
        if provider.name in HOLDS_LOGITS and 16 * request.tokens * shape.vocab > gpu_memory():
            continue  # out of memory at once
        run = once * FACTORS.get(provider.name, OTHER_FACTOR)
        seconds = CHECK_SECONDS[suite] + run
        if provider.name in COMPILING:
            seconds += COMPILE_SECONDS
        if request.timed:
            timed = max(effort.least_runs * run, min(effort.runs * run, effort.max_seconds))
            seconds += max(effort.warm_seconds, run) + timed + run
        total += min(seconds, SUITES[suite].provider_seconds or seconds)
    return total
