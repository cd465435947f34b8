"""Training on fixed responses: both arms see the same tokens, so that sampling adds no noise.

The whole model is trained, its tied head included, with SDPO's default loss over the student's top
100 and a tail.  AdamW's steps do not shrink with the gradient, so that errors of small entries
count in full.  For scale, another dense run trains on another draw of responses.

Dimension key:  B sequences, T response tokens, D hidden size
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.methods.evaluate import evaluating, respond
from benchmarks.sparse.arms import DENSE, SPARSE, Arm, step_record
from fused_sd import divergence_loss, sdpo_loss
from fused_sd.demo import task
from fused_sd.integrations.shared.completion_scores import CompletionForward, with_head
from fused_sd.integrations.transformers import attach

TEMPERATURE = 0.6
HEAD = "lm_head"
OTHER = "dense, other draw"
STEPS_AT_MOST = 10_000  # keeps the sampling seeds of different draws apart


@dataclass(frozen=True)
class Scale:
    """The size of the experiment."""

    steps: int = 20
    words: int = 8  # questions of a step
    held_out: int = 24
    max_length: int = 3
    num_examples: int = 4
    learning_rate: float = 1e-5


class Batch(NamedTuple):
    """Questions with sampled responses, and the teacher's hidden states of the responses."""

    ids: Tensor  # (B, L)
    mask: Tensor  # (B, L)
    loss_mask: Tensor  # (B, T)
    teacher: Tensor  # (B, T, D)


def run(model: Any, tokenizer: Any, seed: int, scale: Scale) -> dict[str, Any]:
    """Train dense and sparse on one draw of responses, and dense on another.

    Args:
        model: The start of every run, in fp32; it is restored at the end.
        tokenizer: The model's tokenizer.
        seed: The seed of the words and responses.
        scale: The size of the experiment.

    Returns:
        ``arms``: for each arm ``steps``, one ``step_record`` for each step; ``held-out loss``;
        ``KL from dense``, of the held-out distributions; and the distances of ``distances``.
    """
    attach(model)
    split = task.split_words()
    draw = draws(model, tokenizer, split.train, seed, scale)
    other = draws(model, tokenizer, split.train, seed + 1000, scale)
    (held_out,) = draws(model, tokenizer, split.held_out, seed, scale, 1, scale.held_out)
    head = model.get_output_embeddings().weight.detach().clone()
    start = _weights(model)
    results: dict[str, Any] = {}
    dense: dict[str, Tensor] = {}
    reference: tuple[Tensor, Tensor] | None = None
    for name, arm, batches in [
        (DENSE.name, DENSE, draw),
        (SPARSE.name, SPARSE, draw),
        (OTHER, DENSE, other),
    ]:
        _restore(model, start)
        steps = train(model, head, batches, arm, scale)
        weights = _weights(model)
        dense = dense or weights
        with evaluating(model):
            loss = _loss(model, head, held_out, DENSE).loss.item()
            states = _forward(model, held_out)(lambda hidden, _: hidden), weights[HEAD]
        reference = reference or states
        results[name] = {
            "steps": steps,
            "held-out loss": loss,
            "KL from dense": _divergence(states, reference, held_out),
            **distances(weights, dense, start),
        }
    _restore(model, start)
    return {"arms": results}


def train(
    model: Any, head: Tensor, batches: Sequence[Batch], arm: Arm, scale: Scale
) -> list[dict[str, float]]:
    """Train one step on each batch; return the steps' records."""
    optimizer = torch.optim.AdamW(model.parameters(), scale.learning_rate, weight_decay=0.0)
    steps = []
    for batch in batches:
        output = _loss(model, head, batch, arm)
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
        steps.append(step_record(output))
    return steps


def draws(
    model: Any,
    tokenizer: Any,
    words: Sequence[str],
    seed: int,
    scale: Scale,
    steps: int | None = None,
    size: int | None = None,
) -> list[Batch]:
    """Return batches of words with responses and teacher states, both of the start model."""
    rng, split = random.Random(seed), task.split_words()
    batches = []
    with evaluating(model):
        for step in range(steps or scale.steps):
            some = rng.sample(list(words), size or scale.words)
            bare = [task.question(word) for word in some]
            informed = [
                task.feedback(word, split, rng, scale.num_examples) + question
                for word, question in zip(some, bare)
            ]
            drawn = respond(
                model,
                tokenizer,
                bare,
                scale.max_length,
                temperature=TEMPERATURE,
                seed=STEPS_AT_MOST * seed + step,
            )
            responses, loss_mask = drawn.ids.to(model.device), drawn.mask.to(model.device)
            teacher_ids, teacher_mask = _with(tokenizer, informed, responses, loss_mask)
            forward = CompletionForward(model, teacher_ids, teacher_mask, responses.shape[1])
            hidden, _ = forward(with_head(outlives_forward=False))
            ids, mask = _with(tokenizer, bare, responses, loss_mask)
            batches.append(Batch(ids, mask, loss_mask, hidden))
    return batches


def distances(
    weights: dict[str, Tensor], dense: dict[str, Tensor], start: dict[str, Tensor]
) -> dict[str, float]:
    """Return ``|w - w_dense| / |w_dense - w_start|`` over all weights and over the head's."""

    def share(names: Sequence[str]) -> float:
        apart = sum((weights[name] - dense[name]).square().sum().item() for name in names)
        moved = sum((dense[name] - start[name]).square().sum().item() for name in names)
        return float((apart / moved) ** 0.5)

    return {"distance": share(list(start)), "head distance": share([HEAD])}


def _loss(model: Any, head: Tensor, batch: Batch, arm: Arm) -> Any:
    """Return SDPO's loss against the start model; ``head`` is a copy of its head."""
    return _forward(model, batch)(
        lambda hidden, student_head: sdpo_loss(
            hidden,
            student_head,
            batch.teacher,
            head,
            token_weights=batch.loss_mask.to(hidden.dtype),
            temperature=TEMPERATURE,
            reduction="mean",
            **arm.loss_options,
        )
    )


def _forward(model: Any, batch: Batch) -> CompletionForward:
    return CompletionForward(model, batch.ids, batch.mask, batch.teacher.shape[1])


def _divergence(
    states: tuple[Tensor, Tensor], reference: tuple[Tensor, Tensor], batch: Batch
) -> float:
    """Return the mean KL(reference || states), both given as hidden states and head."""
    weights = batch.loss_mask.to(states[0].dtype)
    return divergence_loss(
        *states,
        *reference,
        divergence="forward_kl",
        temperature=TEMPERATURE,
        token_weights=weights,
        reduction="mean",
    ).loss.item()


def _with(
    tokenizer: Any, prompts: Sequence[str], responses: Tensor, mask: Tensor
) -> tuple[Tensor, Tensor]:
    """Return ids and mask (B, L) of prompts, padded on the left, followed by the responses."""
    batch = tokenizer(list(prompts), return_tensors="pt", padding=True).to(responses.device)
    ids = torch.cat([batch["input_ids"], responses], 1)
    return ids, torch.cat([batch["attention_mask"], mask], 1)


def _weights(model: Any) -> dict[str, Tensor]:
    """Return copies of all weights by name; a tied head has the name ``HEAD``."""
    head = model.get_output_embeddings().weight
    return {
        HEAD if parameter is head else name: parameter.detach().clone()
        for name, parameter in model.named_parameters()
    }


def _restore(model: Any, weights: dict[str, Tensor]) -> None:
    head = model.get_output_embeddings().weight
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(weights[HEAD if parameter is head else name])
