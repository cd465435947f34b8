"""Operands that ``fused_sd verify`` measures on: states and a head like a language model's.

Noise alone would make every distribution flat, where nothing is hard.  Here the head's rows lie in
clusters, as word forms do, and each token's state points at one of them: the largest logits are
near 25, the entropy near 1 nat, and thousands of entries share the tail.

Dimension key:  N tokens, D hidden size, V vocabulary, K wrong hints
"""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fused_sd.heads import accumulation_dtype

CLUSTER = 16  # rows that are alike
AFFINITY = 0.6  # share of a row that it has in common with its cluster
CLUSTER_LOGIT, BULK_DEVIATION = 24.0, 4.0
NUM_HINTS = 3
SAMPLE = 256  # tokens with a weight, at most: the float64 reference holds their logits
MASK_EVERY = 8
SEARCH_TOKENS, SEARCH_STEPS, SEARCH_TOLERANCE = 64, 20, 0.02


@dataclass(frozen=True, eq=False)
class Operands:
    """What the losses take."""

    hidden: Tensor  # (N, D)
    weight: Tensor  # (V, D)
    teacher: Tensor  # (N, D), at some KL from hidden
    token_weights: Tensor  # (N,), 0 for the masked
    token_ids: Tensor  # (N,), sampled from the student
    old_log_probs: Tensor  # (N,)
    advantages: Tensor  # (N,)
    correct_log_probs: Tensor  # (N,)
    wrong_log_probs: Tensor  # (N, K)

    @property
    def vocab(self) -> int:
        return self.weight.shape[0]

    def tokens(self, index: Tensor | slice) -> "Operands":
        """Some of the tokens, under the same head."""
        chosen = {name: value[index] for name, value in vars(self).items() if name != "weight"}
        return replace(self, **chosen)

    def active(self) -> "Operands":
        """The tokens that have a weight."""
        return self.tokens(self.token_weights != 0)

    def spoiled(self) -> "Operands":
        """NaN, and ids of no token, in all that the masked tokens hold."""
        masked, garbage = self.token_weights == 0, {}
        for name, value in vars(self).items():
            if name not in ("weight", "token_weights"):
                garbage[name] = value.clone()
                garbage[name][masked] = torch.nan if value.is_floating_point() else self.vocab + 7
        return replace(self, **garbage)


def make_operands(
    num_tokens: int,
    hidden_size: int,
    vocab: int,
    dtype: torch.dtype,
    device: torch.device,
    seed: int,
) -> tuple[Operands, Tensor]:
    """Operands whose teacher is still the student, and the direction (N, D) in which it will part.

    Everything is drawn on the CPU, so that a seed means the same on every device.
    """
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=draw)

    num_clusters = max(1, vocab // CLUSTER)
    centres = torch.nn.functional.normalize(normal(num_clusters, hidden_size), dim=-1)
    of_row = torch.randint(num_clusters, (vocab,), generator=draw)
    weight = normal(vocab, hidden_size).mul_(math.sqrt((1 - AFFINITY) / hidden_size))
    weight += centres[of_row] * math.sqrt(AFFINITY)
    pull = CLUSTER_LOGIT / math.sqrt(AFFINITY)
    share = pull**2 / hidden_size  # of the bulk's variance; a small state is mostly its pull
    spread = math.sqrt(max(BULK_DEVIATION**2 - share, share / 4))
    hidden = pull * centres[torch.randint(num_clusters, (num_tokens,), generator=draw)]
    hidden = hidden + spread * normal(num_tokens, hidden_size)
    direction = normal(num_tokens, hidden_size).to(device)
    hidden, weight = hidden.to(device, dtype), weight.to(device, dtype)

    wide = accumulation_dtype(dtype)
    weights = torch.rand(num_tokens, generator=draw) + 0.5
    at = torch.arange(num_tokens)
    weights[(at % MASK_EVERY == 1) | (at >= SAMPLE)] = 0
    chosen = torch.empty(num_tokens, dtype=torch.int64)
    log_prob = torch.empty(num_tokens, dtype=torch.float64)
    for rows in at.split(SEARCH_TOKENS):  # a few at a time: these logits are float64
        log_s = _logits(hidden[rows.to(device)], weight).log_softmax(-1).cpu()
        chosen[rows] = torch.multinomial(log_s.exp(), 1, generator=draw)[:, 0]
        log_prob[rows] = log_s.gather(1, chosen[rows, None])[:, 0]

    def near(deviation: float, *shape: int) -> Tensor:
        """Log-probabilities of the sampled tokens by policies not far from the student."""
        around = log_prob.view(-1, *[1] * (len(shape) - 1))
        return (around + deviation * normal(*shape)).clamp(max=0).to(device, wide)

    operands = Operands(
        hidden,
        weight,
        hidden,
        weights.to(device, wide),
        chosen.to(device),
        near(0.1, num_tokens),
        normal(num_tokens).to(device, wide),
        near(0.02, num_tokens),
        near(0.02, num_tokens, NUM_HINTS),
    )
    return operands, direction


def with_teacher_at(operands: Operands, direction: Tensor, kl: float) -> Operands:
    """The teacher ``gap * direction`` from the student, with the gap that gives a mean KL(t||s).

    The gap is searched by bisection on its logarithm and on the operands as they are, rounded to
    their dtype, which swallows most of a small gap; few tokens therefore reach the KL only roughly.
    """
    index = torch.nonzero(operands.token_weights)[:SEARCH_TOKENS, 0]
    some, way = operands.tokens(index), direction[index]
    log_s = _logits(some.hidden, some.weight).log_softmax(-1)

    def mean_kl(gap: float) -> float:
        log_t = _logits(_moved(some.hidden, way, gap), some.weight).log_softmax(-1)
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
            break
        low, high = (gap, high) if reached < kl else (low, gap)
    else:
        gap = high  # the teacher must differ from the student at all
    return replace(operands, teacher=_moved(operands.hidden, direction, gap))


def _moved(hidden: Tensor, direction: Tensor, gap: float) -> Tensor:
    wide = accumulation_dtype(hidden.dtype)
    return (hidden.to(wide) + gap * direction.to(wide)).to(hidden.dtype)


def _logits(hidden: Tensor, weight: Tensor) -> Tensor:
    """Logits (N, V) for choosing inputs: they need not be exact, only the same on both sides."""
    wide = accumulation_dtype(hidden.dtype)
    return (hidden.to(wide) @ weight.to(wide).T).double()
