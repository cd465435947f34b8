"""Samples responses with transformers, each from a seed of its own.

Dimension key:  B requests, V vocabulary
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

NO_TOKEN = -1
"""An end that no response has; None would stand for the model's own ends."""


@dataclass
class Sampling:
    """How tokens are sampled, by verl's names; a temperature of 0 takes the likeliest token."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = -1
    repetition_penalty: float = 1.0

    def processors(self) -> LogitsProcessorList:
        """Return what turns logits into those of the distribution that is sampled."""
        found = LogitsProcessorList()
        if self.temperature not in (0, 1):
            found.append(TemperatureLogitsWarper(self.temperature))
        if self.top_k > 0:
            found.append(TopKLogitsWarper(self.top_k))
        if self.top_p < 1:
            found.append(TopPLogitsWarper(self.top_p))
        return found


@dataclass
class Request:
    """One response to sample.

    Attributes:
        prompt_ids: the prompt's tokens.
        max_tokens: most tokens of the response.
        sampling: how they are sampled.
        seed: the same seed samples the same response, in whatever batch.
    """

    prompt_ids: list[int]
    max_tokens: int
    sampling: Sampling = field(default_factory=Sampling)
    seed: int = 0


class Draw(LogitsProcessor):
    """Adds Gumbel noise, so that the largest score is a sample, and keeps its log-probability."""

    def __init__(self, seeds: Sequence[int], *, greedy: bool) -> None:
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        self.greedy = greedy
        self.log_probs: list[Tensor] = []  # (B,) of each step

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        log_probs = scores.float().log_softmax(-1)  # (B, V)
        noisy = log_probs
        if not self.greedy:
            rows = [
                torch.empty(scores.shape[-1]).exponential_(generator=generator)
                for generator in self.generators
            ]
            noisy = log_probs - torch.stack(rows).log()
        drawn = noisy.argmax(-1, keepdim=True)
        self.log_probs.append(log_probs.gather(-1, drawn)[:, 0])
        return noisy


@torch.no_grad()
def complete(
    model: Any, requests: Sequence[Request], *, pad: int, ends: Sequence[int]
) -> list[tuple[list[int], list[float]]]:
    """Sample a response to each request.

    Args:
        model: a causal language model of transformers.
        requests: all with the same ``sampling``.
        pad: the token before shorter prompts.
        ends: tokens that end a response; none: it ends at ``max_tokens``.

    Returns:
        Each response's tokens, the end included, and their log-probabilities in nats under the
        distribution that was sampled.
    """
    sampling = requests[0].sampling
    longest = max(len(request.prompt_ids) for request in requests)
    padded = [[pad] * (longest - len(one.prompt_ids)) + one.prompt_ids for one in requests]
    mask = [[0] * (longest - len(one.prompt_ids)) + [1] * len(one.prompt_ids) for one in requests]
    draw = Draw([request.seed for request in requests], greedy=sampling.temperature == 0)
    settings = GenerationConfig(
        do_sample=False,  # the noise samples
        max_new_tokens=max(request.max_tokens for request in requests),
        repetition_penalty=sampling.repetition_penalty,
        eos_token_id=list(ends) or [NO_TOKEN],
        pad_token_id=pad,
    )
    sequences = model.generate(
        input_ids=torch.tensor(padded),
        attention_mask=torch.tensor(mask),
        generation_config=settings,
        logits_processor=LogitsProcessorList([*sampling.processors(), draw]),
    )
    log_probs = torch.stack(draw.log_probs, 1).tolist()
    return [
        _cut(sequence[longest:].tolist(), scores, request.max_tokens, ends)
        for sequence, scores, request in zip(sequences, log_probs, requests)
    ]


def _cut(
    tokens: list[int], log_probs: list[float], max_tokens: int, ends: Sequence[int]
) -> tuple[list[int], list[float]]:
    """Leave out what was generated behind a response's end."""
    length = min(len(tokens), max_tokens)
    length = next((n + 1 for n, token in enumerate(tokens[:length]) if token in ends), length)
    return tokens[:length], log_probs[:length]
