"""Hidden states and a head that are distributed like a language model's, to measure on.

Pure noise would make every distribution flat, and a flat distribution is easy for every
implementation.  Here the head's rows lie in clusters, as word forms do, and the state of each token
points at one cluster: the largest logits are near 25, the entropy is near 1 nat, and thousands of
entries share the tail.  The state of a *decided* token also points at one row of its cluster, as
the states of most tokens of a policy do.

*Graded* states have any chosen entropy.  For them the head's rows also share one direction, each
row by its frequency.  A state is that direction and noise, times a random sharpness, plus a random
pull towards one row.  Logits then fall with the logarithm of their rank, as a model's do at that
entropy (benchmarks/notes.md).

Everything is drawn on the generator's device.

Dimension key:  N tokens, D hidden size, V vocabulary
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from fused_sd.head.projection import accumulation_dtype, matmul

CLUSTER = 16  # rows of a cluster
AFFINITY = 0.6  # share of a row's squared length that it has in common with its cluster
CLUSTER_LOGIT, BULK_DEVIATION = 24.0, 4.0  # logits in the cluster; deviation of the others
DECIDED_LOGIT, DECIDED_CLUSTER_LOGIT = 12.0, 20.0  # of a decided token: its row's, on top of these
FREQUENCY_LENGTH = 0.1  # length along the common direction for each unit of log-frequency
# Graded states, in units in which one of log-frequency is a logit of 1: deviation of the noise's
# logits, the largest pull towards a row, and the deviation of the sharpness's logarithm.
NOISE_DEVIATION, LARGEST_PULL, SHARPNESS_DEVIATION = 2.5, 16.0, 0.2
SLAB = 2**15  # rows of a head that are drawn, or converted to fp32, at a time
SEARCH_STEPS, SEARCH_TOLERANCE = 20, 0.02


def normal(draw: torch.Generator, *shape: int) -> Tensor:
    """Draw fp32 noise of variance 1."""
    return torch.randn(shape, generator=draw, device=draw.device)


def draw_head(
    vocab: int, hidden_size: int, dtype: torch.dtype, draw: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """Draw a head (V, D) whose rows have length 1.

    Returns:
        weight: (V, D).
        centres: (V // CLUSTER, D) fp32, the clusters' centres.
        of_row: (V,) int64, the cluster of each row.
    """
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
    """Draw fp32 states (N, D), each pointing at a cluster."""
    at = torch.randint(len(centres), (num_tokens,), generator=draw, device=draw.device)
    return _bulk(CLUSTER_LOGIT, num_tokens, centres, draw, at)


def draw_policy_states(
    num_tokens: int, weight: Tensor, centres: Tensor, of_row: Tensor, draw: torch.Generator
) -> Tensor:
    """Draw fp32 states (N, D), each pointing at a cluster and every second one at a row of it."""
    row = torch.randint(len(weight), (num_tokens,), generator=draw, device=draw.device)
    states = _bulk(DECIDED_CLUSTER_LOGIT, num_tokens, centres, draw, of_row[row])
    own = weight[row[::2]].float() - math.sqrt(AFFINITY) * centres[of_row[row[::2]]]
    states[::2] += DECIDED_LOGIT / (1 - AFFINITY) * own
    return states


def add_frequencies_(weight: Tensor, draw: torch.Generator) -> Tensor:
    """Add a common direction to the rows of a head (V, D) in place, by random frequencies.

    The frequencies fall as a power of their rank.

    Returns:
        (D,) fp32, the common direction.
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
    """Draw fp32 states (N, D), some open, some decided; a factor on them sets the mean entropy."""
    row = torch.randint(len(weight), (num_tokens,), generator=draw, device=draw.device)
    own = weight[row].float() - math.sqrt(AFFINITY) * centres[of_row[row]]
    pull = LARGEST_PULL * torch.rand((num_tokens, 1), generator=draw, device=draw.device)
    states = NOISE_DEVIATION * normal(draw, num_tokens, len(direction))
    states += pull / (1 - AFFINITY) * own
    states += (1 / FREQUENCY_LENGTH - states @ direction)[:, None] * direction
    return states * torch.exp(SHARPNESS_DEVIATION * normal(draw, num_tokens, 1))


def sharpness_at(states: Tensor, weight: Tensor, entropy: float) -> float:
    """Return the factor on graded states at which their mean entropy is ``entropy`` nat.

    The factor is found by bisection.
    """

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
    """Draw states (N, D): logits near ``cluster_logit`` in the clusters ``at`` (N,), else noise."""
    hidden_size = centres.shape[1]
    pull = cluster_logit / math.sqrt(AFFINITY)
    share = pull**2 / hidden_size  # share of the variance; a state of small D is mostly its pull
    spread = math.sqrt(max(BULK_DEVIATION**2 - share, share / 4))
    return pull * centres[at] + spread * normal(draw, num_tokens, hidden_size)


def moved(hidden: Tensor, direction: Tensor, gap: float) -> Tensor:
    """Return the states (N, D) moved by ``gap`` in a direction (N, D), in their dtype."""
    wide = accumulation_dtype(hidden.dtype)
    return (hidden.to(wide) + gap * direction.to(wide)).to(hidden.dtype)


def gap_at(hidden: Tensor, weight: Tensor, direction: Tensor, kl: float) -> float:
    """Return the gap in a direction (N, D) at which the teacher's mean KL(t||s) is ``kl``.

    The gap is found by bisection of its logarithm, on operands that are rounded to their dtype.
    Rounding swallows most of a small gap, so that few tokens reach the KL only roughly.
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
    return high  # not low: at low the teacher may equal the student


def wide_logits(hidden: Tensor, weight: Tensor) -> Tensor:
    """Return logits (N, V) for drawing operands: not exact, but alike on both sides."""
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
    """Yield slices of at most ``size`` rows that cover all rows."""
    for start in range(0, num_rows, size):
        yield slice(start, min(start + size, num_rows))
