"""Pre-training of tiny models from nothing, on text that a task writes.

A training has a fixed number of steps.  Rounding differs between machines, and grows while a model
learns: the same seed gives another model elsewhere, so that results are averages over several.
"""

import json
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

IGNORED = -100

Draw = Callable[[random.Random, int], list[tuple[str, str]]]
"""Returns pairs of a context and the response to it, given random numbers and how many."""

Batches = Callable[[random.Random, int], tuple[dict[str, Tensor], Tensor]]
"""Returns a model's inputs and the labels (B, L), given random numbers and the sequences."""


@dataclass(frozen=True)
class Size:
    """The shape of a model, and the learning rate that its pre-training bears.

    Attributes:
        width: The hidden size; a head has 16 channels for width 64, else 32.
        layers: The number of layers.
        rate: The peak learning rate.
    """

    width: int
    layers: int
    rate: float


SIZES = {
    "0.1M": Size(64, 2, 5e-3),
    "0.4M": Size(128, 2, 3e-3),
    "3M": Size(256, 4, 1.5e-3),
    "12M": Size(512, 4, 7e-4),
}


@dataclass(frozen=True)
class Schedule:
    """The length of a pre-training: steps, sequences of a step, and the rate's rise and fall."""

    steps: int
    batch: int = 96
    warmup: int = 30
    cooling: int = 75


def tiny_model(vocab: int, size: Size = SIZES["0.1M"], max_length: int = 128) -> Qwen3ForCausalLM:
    """Return a random model whose padding is token 0 and whose end is token 1."""
    head = 16 if size.width == 64 else 32
    config = Qwen3Config(
        vocab_size=vocab,
        hidden_size=size.width,
        intermediate_size=3 * size.width,
        num_hidden_layers=size.layers,
        num_attention_heads=size.width // head,
        num_key_value_heads=size.width // head,
        head_dim=head,
        max_position_embeddings=max_length,
        tie_word_embeddings=True,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
    )
    return Qwen3ForCausalLM(config)


def padded(tokenizer: Any, pairs: Sequence[tuple[str, str]]) -> tuple[Tensor, Tensor]:
    """Return sequences (B, L), padded on the right, and labels; only responses have a loss."""
    contexts = tokenizer([context for context, _ in pairs])["input_ids"]
    responses = tokenizer([response for _, response in pairs])["input_ids"]
    length = max(len(before) + len(after) for before, after in zip(contexts, responses)) + 1
    ids = torch.full((len(pairs), length), tokenizer.pad_token_id)
    labels = torch.full((len(pairs), length), IGNORED)
    for row, (before, after) in enumerate(zip(contexts, responses)):
        whole = torch.tensor([*before, *after, tokenizer.eos_token_id])
        ids[row, : len(whole)] = whole
        labels[row, len(before) : len(whole)] = whole[len(before) :]
    return ids, labels


def pretrain(
    tokenizer: Any, draw: Draw, schedule: Schedule, *, size: Size = SIZES["0.1M"], seed: int
) -> Qwen3ForCausalLM:
    """Return a language model that has been trained on ``draw``'s text, in evaluation mode."""

    def batches(rng: random.Random, count: int) -> tuple[dict[str, Tensor], Tensor]:
        # padding is on the right of a causal model: no mask is needed
        ids, labels = padded(tokenizer, draw(rng, count))
        return {"input_ids": ids}, labels

    return fitted(
        lambda: tiny_model(len(tokenizer), size), batches, schedule, rate=size.rate, seed=seed
    )


def fitted(
    make: Callable[[], Any], batches: Batches, schedule: Schedule, *, rate: float, seed: int
) -> Any:
    """Return a model that has been trained on batches, in evaluation mode.

    Args:
        make: Makes the random model.
        batches: Draws what it is trained on.
        schedule: The length of the training.
        rate: The peak learning rate.
        seed: The seed of the weights and of the batches.
    """
    rng = random.Random(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = make()
        optimizer = torch.optim.AdamW(
            model.parameters(), rate, betas=(0.9, 0.98), weight_decay=0.01
        )
        for step in range(1, schedule.steps + 1):
            left = (schedule.steps - step + 1) / schedule.cooling
            for group in optimizer.param_groups:
                group["lr"] = rate * min(1.0, step / schedule.warmup, left)
            inputs, labels = batches(rng, schedule.batch)
            logits = model(**inputs, use_cache=False).logits[:, :-1]
            loss = cross_entropy(
                logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED
            )
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
    return model.eval()


def kept(folder: Path, make: Callable[[], tuple[Any, ...]]) -> Path:
    """Return the folder of a model and its tokenizer, if it has one; the first call makes them."""
    made = folder / "made.json"
    if not made.exists():
        started = time.perf_counter()
        for part in make():
            part.save_pretrained(folder)
        # written last: without it the next run makes the model again
        made.write_text(json.dumps({"seconds": time.perf_counter() - started}))
    return folder


def loaded(folder: Path) -> tuple[Any, Any]:
    """Return the language model of a folder in fp32 and its tokenizer."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model, AutoTokenizer.from_pretrained(folder)
