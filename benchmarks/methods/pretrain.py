"""Pre-training of a tiny Qwen3 that adds badly, but well after a hint, in about a minute.

The training text contains every context that a teacher reads.  Revising a wrong answer is the
hardest to learn: when revisions are right often enough, the learning rate falls to zero and
training ends.
"""

import json
import random
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import Qwen3Config, Qwen3ForCausalLM

from benchmarks.methods import arithmetic
from benchmarks.methods.evaluate import respond
from benchmarks.methods.tokens import character_tokenizer

# shares of the contexts in the text
MIX = {"plain": 0.3, "solution": 0.08, "answer": 0.1, "after wrong": 0.45, "after right": 0.07}
ACCURACY = 0.8  # greedy accuracy of revisions on the validation questions that ends training
LEARNING_RATE, BATCH = 5e-3, 96
WARMUP, COOLING = 30, 75  # steps
FIRST_LOOK, LOOK_EVERY, MAX_STEPS = 200, 20, 1000
IGNORED = -100
VERSION = 3  # raise it with every change of the weights or questions: it names the folders


def tiny_model(vocab: int) -> Qwen3ForCausalLM:
    """Return a random model with two layers of width 64: 0.1 M parameters."""
    config = Qwen3Config(
        vocab_size=vocab,
        hidden_size=64,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=16,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
    )
    return Qwen3ForCausalLM(config)


def batch_of(
    tokenizer: Any, pool: Sequence[arithmetic.Sum], rng: random.Random, size: int
) -> tuple[Tensor, Tensor]:
    """Return sequences (B, L), padded on the right, and labels; only responses have a loss."""
    kinds = rng.choices(list(MIX), list(MIX.values()), k=size)
    questions = rng.choices(pool, k=size)
    contexts = tokenizer([arithmetic.context(*pair, rng) for pair in zip(kinds, questions)])
    wanted = [
        arithmetic.habitual(question, rng) if kind == "plain" else question.solution
        for kind, question in zip(kinds, questions)
    ]
    solutions = tokenizer(wanted)
    end = [tokenizer.eos_token_id]
    pairs = list(zip(contexts["input_ids"], solutions["input_ids"]))
    length = max(len(before) + len(after) for before, after in pairs) + 1
    ids = torch.full((size, length), tokenizer.pad_token_id)
    labels = torch.full((size, length), IGNORED)
    for row, (before, after) in enumerate(pairs):
        whole = torch.tensor([*before, *after, *end])
        ids[row, : len(whole)] = whole
        labels[row, len(before) : len(whole)] = whole[len(before) :]
    return ids, labels


def context_accuracy(
    model: Any, tokenizer: Any, kind: str, questions: Sequence[arithmetic.Sum]
) -> float:
    """Return the greedy accuracy after a context of one kind, a key of ``MIX``."""
    rng = random.Random(0)
    contexts = [arithmetic.context(kind, question, rng) for question in questions]
    said = respond(model, tokenizer, contexts, arithmetic.MAX_RESPONSE).texts
    right = [text == question.solution for text, question in zip(said, questions)]
    return sum(right) / len(right)


def pretrain(
    seed: int, *, accuracy: float = ACCURACY, max_steps: int = MAX_STEPS
) -> tuple[Any, Any, dict[str, float]]:
    """Return a trained model, its tokenizer, and the steps and seconds of the training.

    Raises:
        RuntimeError: The accuracy was not reached in ``max_steps``.
    """
    started = time.perf_counter()
    parts = arithmetic.splits()
    tokenizer = character_tokenizer(arithmetic.SYMBOLS)
    rng = random.Random(seed)
    reached, last = 0.0, max_steps
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = tiny_model(len(tokenizer))
        optimizer = torch.optim.AdamW(
            model.parameters(), LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.01
        )
        step = 0
        while step < last:
            step += 1
            for group in optimizer.param_groups:
                left = (last - step + 1) / COOLING
                group["lr"] = LEARNING_RATE * min(1.0, step / WARMUP, left)
            ids, labels = batch_of(tokenizer, parts["pretraining"], rng, BATCH)
            # padding is on the right of a causal model: no mask is needed
            logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
            loss = cross_entropy(
                logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED
            )
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            if reached < accuracy and step >= FIRST_LOOK and step % LOOK_EVERY == 0:
                reached = context_accuracy(model, tokenizer, "after wrong", parts["validation"])
                if reached >= accuracy:
                    last = min(max_steps, step + COOLING)
    if reached < accuracy:
        raise RuntimeError(
            f"pre-training must reach {accuracy:.0%}, got {reached:.0%} after {max_steps} steps; "
            "choose another seed"
        )
    seconds = time.perf_counter() - started
    return model.eval(), tokenizer, {"steps": step, "seconds": seconds}


def base_model(seed: int, cache: Path) -> Path:
    """Return the folder of the seed's model, which the first call trains."""
    folder = cache / f"tiny-{VERSION}-{seed}"
    measured = folder / "measured.json"
    if not measured.exists():
        model, tokenizer, values = pretrain(seed)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        # written last: without it the next run trains the model again
        measured.write_text(json.dumps(values))
    return folder
