"""States and a head like a language model's, for measuring on.

Noise alone would make every distribution flat, where nothing is hard.  Here the head's rows lie in
clusters, as word forms do, and each token's state points at one of them: the largest logits are
near 25, the entropy near 1 nat, and thousands of entries share the tail.  A decided token's state
leans towards one row of its cluster besides, as most of a policy's tokens do.

Where the entropy is chosen, the head's rows have a direction in common too, by their frequency,
and states are that direction and noise, of more or less sharpness, each drawn towards a row by more
or less: logits fall off with the logarithm of their rank, as far as a model's at that entropy do
(benchmarks/notes.md).

Everything is drawn on the generator's device.

Dimension key:  N tokens, D hidden size, V vocabulary
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from fused_sd.head.projection import accumulation_dtype, matmul

CLUSTER = 16  # rows that are alike
AFFINITY = 0.6  # share of a row that it has in common with its cluster
CLUSTER_LOGIT, BULK_DEVIATION = 24.0, 4.0
DECIDED_LOGIT, DECIDED_CLUSTER_LOGIT = 12.0, 20.0
FREQUENCY_LENGTH = 0.1  # of a row, for each unit of its frequency's logarithm
# of a graded state, where a unit of frequency is a logit of 1: deviation of the noise's logits, and
# the largest pull towards a row; and the deviation of the sharpness's logarithm
NOISE_DEVIATION, LARGEST_PULL, SHARPNESS_DEVIATION = 2.5, 16.0, 0.2
SLAB = 2**15  # rows of a head that are drawn, or widened, at a time
SEARCH_STEPS, SEARCH_TOLERANCE = 20, 0.02


def normal(draw: torch.Generator, *shape: int) -> Tensor:
    """fp32 noise of variance 1."""
    return torch.randn(shape, generator=draw, device=draw.device)


def draw_head(
    vocab: int, hidden_size: int, dtype: torch.dtype, draw: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """A head (V, D) of rows of length 1, its clusters' centres, and the cluster of each row."""
    num_clusters = max(1, vocab // CLUSTER)
    centres = torch.nn.functional.normalize(normal(draw, num_clusters, hidden_size), dim=-1)
    of_row = torch.randint(num_clusters, (vocab,), generator=draw, device=draw.device)
    weight = torch.empty((vocab, hidden_size), dtype=dtype, device=draw.device)
    for rows in slabs(vocab):
        noise = normal(draw, rows.stop - rows.start, hidden_size)
        noise *= math.sqrt((1 - AFFINITY) / hidden_size)
        weight[rows] = noise + centres[of_row[rows]] * math.sqrt(AFFINITY)
    return weight, centres, of_row


def draw_states(num_tokens: int, centres: Tensor, draw: torch.Generator) -> Tensor:
    """fp32 states (N, D), each pointing at a cluster."""
    at = torch.randint(len(centres), (num_tokens,), generator=draw, device=draw.device)
    return _bulk(CLUSTER_LOGIT, num_tokens, centres, draw, at)


def draw_policy_states(
    num_tokens: int, weight: Tensor, centres: Tensor, of_row: Tensor, draw: torch.Generator
) -> Tensor:
    """fp32 states (N, D), each pointing at a cluster and every second one at a row of it."""
    row = torch.randint(len(weight), (num_tokens,), generator=draw, device=draw.device)
    states = _bulk(DECIDED_CLUSTER_LOGIT, num_tokens, centres, draw, of_row[row])
    own = weight[row[::2]].float() - math.sqrt(AFFINITY) * centres[of_row[row[::2]]]
    states[::2] += DECIDED_LOGIT / (1 - AFFINITY) * own
    return states


def add_frequencies_(weight: Tensor, draw: torch.Generator) -> Tensor:
    """Draw rows' frequencies, powers of their rank, into a head (V, D).

    Returns:
        (D,) fp32, the rows' common direction.
    """
    direction = torch.nn.functional.normalize(normal(draw, weight.shape[1]), dim=0)
    logarithm = torch.empty(len(weight), 1, device=draw.device).exponential_(generator=draw)
    for rows in slabs(len(weight)):
        weight[rows] = weight[rows] + FREQUENCY_LENGTH * logarithm[rows] * direction
    return direction


def draw_graded_states(
    num_tokens: int,
    weight: Tensor,
    centres: Tensor,
    of_row: Tensor,
    direction: Tensor,
    draw: torch.Generator,
) -> Tensor:
    """fp32 states (N, D), open to decided: multiplied by a factor they have any entropy."""
    row = torch.randint(len(weight), (num_tokens,), generator=draw, device=draw.device)
    own = weight[row].float() - math.sqrt(AFFINITY) * centres[of_row[row]]
    pull = LARGEST_PULL * torch.rand((num_tokens, 1), generator=draw, device=draw.device)
    states = NOISE_DEVIATION * normal(draw, num_tokens, len(direction))
    states += pull / (1 - AFFINITY) * own
    states += (1 / FREQUENCY_LENGTH - states @ direction)[:, None] * direction
    return states * torch.exp(SHARPNESS_DEVIATION * normal(draw, num_tokens, 1))


def sharpness_at(states: Tensor, weight: Tensor, entropy: float) -> float:
    """The factor on graded states at which their mean entropy is so many nat, by bisection."""

    def mean_entropy(factor: float) -> float:
        log_s = wide_logits((factor * states).to(weight.dtype), weight).log_softmax(-1)
        return float(-(log_s.exp() * log_s).sum(-1).mean())

    low = high = factor = 2.0
    while mean_entropy(low) < entropy:
        low /= 2
    while mean_entropy(high) > entropy:
        high *= 2
    for _ in range(SEARCH_STEPS):
        factor = math.sqrt(low * high)
        reached = mean_entropy(factor)
        if abs(reached / entropy - 1) < SEARCH_TOLERANCE:
            break
        low, high = (low, factor) if reached < entropy else (factor, high)
    return factor


def _bulk(
    cluster_logit: float, num_tokens: int, centres: Tensor, draw: torch.Generator, at: Tensor
) -> Tensor:
    """States whose logits are near ``cluster_logit`` in a cluster, and noise elsewhere."""
    hidden_size = centres.shape[1]
    pull = cluster_logit / math.sqrt(AFFINITY)
    share = pull**2 / hidden_size  # of the bulk's variance; a small state is mostly its pull
    spread = math.sqrt(max(BULK_DEVIATION**2 - share, share / 4))
    return pull * centres[at] + spread * normal(draw, num_tokens, hidden_size)


def moved(hidden: Tensor, direction: Tensor, gap: float) -> Tensor:
    """The states a gap away, in their dtype."""
    wide = accumulation_dtype(hidden.dtype)
    return (hidden.to(wide) + gap * direction.to(wide)).to(hidden.dtype)


def gap_at(hidden: Tensor, weight: Tensor, direction: Tensor, kl: float) -> float:
    """The gap in a direction (N, D) at which the teacher's mean KL(t||s) is ``kl``.

    It is searched by bisection on its logarithm and on the operands as they are, rounded to
    their dtype, which swallows most of a small gap; few tokens therefore reach the KL only roughly.
    """
    log_s = wide_logits(hidden, weight).double().log_softmax(-1)

    def mean_kl(gap: float) -> float:
        log_t = wide_logits(moved(hidden, direction, gap), weight).double().log_softmax(-1)
        return float((log_t.exp() * (log_t - log_s)).sum(-1).mean())

    low = high = gap = math.sqrt(2 * kl)  # exact for small gaps and rows of length 1
    while mean_kl(high) < kl:
        high *= 2
    while mean_kl(low) > kl:
        low /= 2
    for _ in range(SEARCH_STEPS):
        gap = math.sqrt(low * high)
        reached = mean_kl(gap)
        if abs(reached / kl - 1) < SEARCH_TOLERANCE:
            return gap
        low, high = (gap, high) if reached < kl else (low, gap)
    return high  # the teacher must differ from the student at all


def wide_logits(hidden: Tensor, weight: Tensor) -> Tensor:
    """Logits (N, V) for choosing operands: they need not be exact, only the same on both sides."""
    wide = accumulation_dtype(hidden.dtype)
    logits = hidden.new_empty((len(hidden), len(weight)), dtype=wide)
    mixed = hidden.is_cuda and hidden.dtype != wide
    for rows in slabs(len(weight)):
        part = hidden.new_empty((len(hidden), rows.stop - rows.start), dtype=wide)
        if mixed:
            matmul(hidden, weight[rows].t(), part)
        else:
            torch.mm(hidden.to(wide), weight[rows].to(wide).t(), out=part)
        logits[:, rows] = part
    return logits


def slabs(num_rows: int, size: int = SLAB) -> Iterator[slice]:
    """Slices of at most ``size`` rows that cover them all."""
    for start in range(0, num_rows, size):
        yield slice(start, min(start + size, num_rows))
