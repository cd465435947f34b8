"""What is measured: the cells of each suite, by parts, and how long each is expected to take.

Not every shape, length, objective and provider with every other: the parts vary one at a time.
"""

from typing import Any, NamedTuple

from fused_sd.bench.floor import FLOOR_RUNS, products
from fused_sd.bench.measure import Effort
from fused_sd.bench.problem import MEAN_KL, OBJECTIVES, SHAPES
from fused_sd.bench.providers import PROVIDERS

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
ON_CPU = ("fused_sd", "eager", "TRL chunked divergence", "TRL chunked log-probs")


class Asked(NamedTuple):
    """One cell."""

    shape: str
    tokens: int
    objective: str
    providers: tuple[str, ...] = EVERY
    trainable: bool = True
    mask_share: float = 0.0
    kl: float = MEAN_KL
    dtype: str = "bfloat16"
    timed: bool = True
    entropy: float | None = None  # nat; None: that of the default operands

    @property
    def key(self) -> str:
        """Names the cell in the results."""
        parts = [self.shape, str(self.tokens), self.objective, self.dtype]
        parts += [] if self.trainable else ["frozen"]
        parts += [f"mask {self.mask_share:g}"] if self.mask_share else []
        parts += [f"KL {self.kl:g}"] if self.kl != MEAN_KL else []
        parts += [] if self.entropy is None else [f"entropy {self.entropy:g}"]
        return ", ".join(parts if self.timed else [*parts, "errors"])


class Suite(NamedTuple):
    """Parts in the order in which they are run, and how much is measured."""

    parts: dict[str, list[Asked]]
    effort: Effort
    floor_warm_seconds: float
    minutes: float  # for all parts


def _sparse(shape: str, tokens: int, **others: Any) -> list[Asked]:
    """Gradients with few entries, at the entropies of policies from sharp to soft."""

    def cell(objective: str, entropy: float, *providers: str) -> Asked:
        asked = Asked(shape, tokens, objective, ("fused_sd", *providers), entropy=entropy)
        return asked._replace(**others)

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
            Asked(big, 16384, "reverse_kl", tuple(n for n in EVERY if n != FP32)),
            Asked(big, 16384, "jsd", QUICK),
            Asked(big, 4096, "reverse_kl", (*QUICK, FP32)),
        ],
        "sparse": _sparse(big, 16384),
        "frozen": [
            Asked(big, 16384, "reverse_kl", CHUNKED, trainable=False),
            Asked(big, 16384, "reverse_kl", CHUNKED, mask_share=0.5),
        ],
        "objectives": [
            Asked(big, 4096, objective, QUICK)
            for objective in OBJECTIVES
            if objective not in ("reverse_kl", "jsd")
        ],
        "scaling": [Asked(big, tokens, "reverse_kl", CHUNKED) for tokens in (1024, 65536)],
        "rlsd": [Asked(big, 16384, "rlsd", SAMPLED)],
        "shapes": [
            Asked(shape, 16384, "reverse_kl", CHUNKED)
            for shape in ("qwen3-4b", "olmo-3-7b", "llama-3-8b", "qwen3.5-35b-a3b")
        ],
        "accuracy": [
            Asked("qwen3-4b", 512, objective, QUICK, kl=kl, timed=False)
            for kl in (1e-3, 1e-2, 1e-1)
            for objective in ("reverse_kl", "topk_tail")
        ],
    }
    # 20 runs of whatever takes less than 0.1 s, and never fewer than 5
    return Suite(parts, Effort(0.5, 20, 2.0, 5), 2.0, 9.0)


def _cpu() -> Suite:
    def cell(shape: str, tokens: int, objective: str, **others: Any) -> Asked:
        return Asked(shape, tokens, objective, ON_CPU, dtype="float32")._replace(**others)

    parts = {
        "main": [
            cell("wide", 128, "reverse_kl", providers=(*ON_CPU, "torch.compile")),
            cell("wide", 128, "jsd"),
        ],
        "sparse": _sparse("deep", 256, dtype="float32"),
        "frozen": [
            cell("small", 128, "reverse_kl", trainable=False),
            cell("small", 128, "reverse_kl", mask_share=0.5),
        ],
        "objectives": [cell("small", 128, objective) for objective in OBJECTIVES],
        "scaling": [
            cell("wide", 32, "reverse_kl"),
            cell("wide", 512, "reverse_kl"),
            cell("wide", 1024, "reverse_kl", providers=("fused_sd", "eager")),
        ],
        "accuracy": [
            Asked("small", 64, objective, QUICK, kl=kl, timed=False)
            for kl in (1e-3, 1e-2, 1e-1)
            for objective in ("reverse_kl", "topk_tail")
        ],
    }
    return Suite(parts, Effort(0.0, 5, 8.0, 3), 0.0, 20.0)


SUITES = {"gpu": _gpu(), "cpu": _cpu()}

# time over that of all the products at full speed, from what each does beside them (benchmarks/
# PEERS.md): products in fp32, further projections, passes over whole logits; and seconds that
# compiling takes
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
OTHERS = 3.0
COMPILE_SECONDS = 20.0
WHOLE = ("eager", FP32, "torch.compile", "TRL SDPO")  # hold the logits of all tokens
LARGEST_GPU = 141e9  # bytes
GPU_FLOPS, CPU_FLOPS = 6.0e14, 6.0e10  # sustained; the CPU's on one busy core
SETUP_SECONDS = {"gpu": 0.7, "cpu": 4.0}  # of drawing, shared by cells, and of the truth
CHECK_SECONDS = {"gpu": 0.3, "cpu": 1.0}  # of comparing a provider, and of its first kernels


def expected_seconds(asked: Asked, suite: str) -> float:
    """How long a cell takes, if everybody is installed and nobody runs out of memory."""
    effort = SUITES[suite].effort
    shape = SHAPES[asked.shape]
    flop = 2 * asked.tokens * (1 - asked.mask_share) * shape.hidden_size * shape.vocab
    rate = GPU_FLOPS if suite == "gpu" else CPU_FLOPS
    once = flop * products(asked.objective, asked.trainable).u / rate
    total = SETUP_SECONDS[suite]
    if asked.timed:
        kinds = 1 if asked.dtype == "float32" else 2  # of the floor
        total += SUITES[suite].floor_warm_seconds + kinds * min(effort.runs, FLOOR_RUNS) * once
    for provider in PROVIDERS:
        if provider.name not in asked.providers or asked.objective not in provider.objectives:
            continue
        if suite == "cpu" and provider.needs_gpu:
            continue
        if provider.name in WHOLE and 16 * asked.tokens * shape.vocab > LARGEST_GPU:
            continue  # out of memory at once
        run = once * FACTORS.get(provider.name, OTHERS)
        total += CHECK_SECONDS[suite] + run
        if provider.name in COMPILING:
            total += COMPILE_SECONDS
        if asked.timed:
            timed = max(effort.least_runs * run, min(effort.runs * run, effort.max_seconds))
            total += max(effort.warm_seconds, run) + timed + run
    return total
