"""An engine in vLLM's place, whose log-probabilities are a known distance from the model's."""

from typing import Any

import torch
from trl_pairs import TOKENIZER

LENGTHS = (6, 3, 5, 1)  # of the completions, in turn; the last fills the budget of no test


class RolloutEngine:
    """What TRL's trainers ask of their ``VLLMGeneration``.

    Completions are random tokens; all but the longest end with the end token.  Their
    log-probabilities are the model's plus noise, so that ratios lie on both sides of a cap of 2.

    Args:
        model: whose log-probabilities are disturbed.
        settings: of vLLM, which this engine does not read.
    """

    noise = 0.5  # standard deviation

    def __init__(self, *, model: Any, **settings: Any) -> None:
        self.model = model
        self.generator = torch.Generator().manual_seed(11)

    def sync_weights(self) -> None:
        """There is one copy of the weights."""

    def generate(
        self, prompts: list[list[int]], images: Any, num_generations: int, profiler: Any = None
    ) -> tuple[Any, list[list[int]], list[list[list[float | None]]], None]:
        """Return the prompts, completions, their log-probabilities, and no further ids."""
        completions = [self._completion(LENGTHS[n % len(LENGTHS)]) for n in range(len(prompts))]
        scores = [self._score(*pair) for pair in zip(prompts, completions, strict=True)]
        return prompts, completions, scores, None

    def _completion(self, length: int) -> list[int]:
        ids = torch.randint(2, len(TOKENIZER), (length,), generator=self.generator).tolist()
        return ids if length == max(LENGTHS) else [*ids[:-1], TOKENIZER.eos_token_id]

    @torch.no_grad()
    def _score(self, prompt: list[int], completion: list[int]) -> list[list[float | None]]:
        device = next(self.model.parameters()).device
        ids = torch.tensor([prompt + completion], device=device)
        logits = self.model(input_ids=ids).logits[0, len(prompt) - 1 : -1]
        own = logits.double().log_softmax(-1).cpu()
        own = own.gather(-1, torch.tensor(completion)[:, None])[:, 0]
        noise = self.noise * torch.randn(own.shape, generator=self.generator, dtype=own.dtype)
        return [[float(value)] for value in own + noise]
