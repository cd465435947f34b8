"""Operands that ``fused_sd verify`` measures on: realistic, with everything that a loss may take.

Dimension key:  N tokens, D hidden size, V vocabulary, K wrong hints
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fused_sd.head.projection import accumulation_dtype
from fused_sd.measuring import realistic

NUM_HINTS = 3
SAMPLE = 256  # largest number of kept tokens, because the float64 reference holds their logits
MASK_EVERY = 8  # every 8th token is masked
SEARCH_TOKENS = 64  # tokens on which a KL is set


@dataclass(frozen=True, eq=False)
class Operands:
    """Operands of the losses."""

    hidden: Tensor  # (N, D)
    weight: Tensor  # (V, D)
    teacher: Tensor  # (N, D), hidden states at some KL from the student's
    token_weights: Tensor  # (N,), 0 for masked tokens
    token_ids: Tensor  # (N,), sampled from the student
    old_log_probs: Tensor  # (N,)
    advantages: Tensor  # (N,)
    correct_log_probs: Tensor  # (N,)
    wrong_log_probs: Tensor  # (N, K)

    @property
    def vocab(self) -> int:
        """V."""
        return self.weight.shape[0]

    def tokens(self, index: Tensor | slice) -> "Operands":
        """Return some of the tokens, with the same head."""
        chosen = {name: value[index] for name, value in vars(self).items() if name != "weight"}
        return replace(self, **chosen)

    def active(self) -> "Operands":
        """Return the kept tokens: those with a weight."""
        return self.tokens(self.token_weights != 0)

    def spoiled(self) -> "Operands":
        """Return a copy in which masked tokens hold NaN and ids outside of the vocabulary."""
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
    """Draw operands whose teacher equals the student, and a direction (N, D) to move it in.

    Everything is drawn on the CPU, so that a seed gives the same operands on every device.
    """
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return realistic.normal(draw, *shape)

    weight, centres, _ = realistic.draw_head(vocab, hidden_size, dtype, draw)
    hidden = realistic.draw_states(num_tokens, centres, draw)
    direction = normal(num_tokens, hidden_size).to(device)
    hidden, weight = hidden.to(device, dtype), weight.to(device)

    wide = accumulation_dtype(dtype)
    weights = torch.rand(num_tokens, generator=draw) + 0.5
    at = torch.arange(num_tokens)
    weights[(at % MASK_EVERY == 1) | (at >= SAMPLE)] = 0
    chosen = torch.empty(num_tokens, dtype=torch.int64)
    log_prob = torch.empty(num_tokens, dtype=torch.float64)
    for rows in at.split(SEARCH_TOKENS):  # a few at a time, as these logits are float64
        some = hidden[rows.to(device)]
        log_s = realistic.wide_logits(some, weight).double().log_softmax(-1).cpu()
        chosen[rows] = torch.multinomial(log_s.exp(), 1, generator=draw)[:, 0]
        log_prob[rows] = log_s.gather(1, chosen[rows, None])[:, 0]

    def near(deviation: float, *shape: int) -> Tensor:
        """Log-probabilities of the sampled tokens under policies close to the student."""
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
    """Return operands whose teacher is moved in ``direction`` until the mean KL(t||s) is ``kl``."""
    index = torch.nonzero(operands.token_weights)[:SEARCH_TOKENS, 0]
    some = operands.tokens(index)
    gap = realistic.gap_at(some.hidden, some.weight, direction[index], kl)
    return replace(operands, teacher=realistic.moved(operands.hidden, direction, gap))
