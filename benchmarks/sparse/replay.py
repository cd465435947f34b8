"""The same responses for every arm: losses and weights are compared without sampling's chance.

The whole model is trained, its tied head included, by AdamW, whose steps do not shrink with the
gradient: small errors of small entries count in full.  The loss is SDPO's default, over the
student's top 100 and a tail.  The yardstick is a dense run on another draw of the same questions.

Dimension key:  B sequences, T response tokens, D hidden size
"""

import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.sparse.arms import DENSE, Arm, step_record
from fused_sd import divergence_loss, sdpo_loss
from fused_sd.demo import task
from fused_sd.demo.answers import evaluating
from fused_sd.integrations.shared.completion_scores import CompletionForward, with_head
from fused_sd.integrations.transformers import attach

TEMPERATURE = 0.6
HEAD = "lm_head"
OTHER = "dense, other draw"


@dataclass(frozen=True)
class Scale:
    """How much is run."""

    steps: int = 20
    words: int = 8  # of a step
    held_out: int = 24
    max_length: int = 3
    num_examples: int = 4
    learning_rate: float = 1e-5


class Batch(NamedTuple):
    """Responses after the bare questions, and what the teacher makes of them."""

    ids: Tensor  # (B, L)
    mask: Tensor  # (B, L)
    loss_mask: Tensor  # (B, T)
    teacher: Tensor  # (B, T, D)


def run(model: Any, tokenizer: Any, arms: Sequence[Arm], seed: int, scale: Scale) -> dict[str, Any]:
    """Train a copy for each arm on one draw, and a dense one on another.

    Args:
        model: the start, in fp32; it is not changed.

    Returns:
        ``arms``: name -> records of the steps, loss on held-out words, KL from the dense arm's
        distributions there, and the distances ``|w - w_dense| / |w_dense - w_start|`` of the
        weights, of all and of the head.
    """
    attach(model)
    split = task.split_words()
    draw = draws(model, tokenizer, split.train, seed, scale)
    other = draws(model, tokenizer, split.train, seed + 1000, scale)
    (held_out,) = draws(model, tokenizer, split.held_out, seed, scale, 1, scale.held_out)
    head = model.get_output_embeddings().weight.detach().clone()
    start = _weights(model)
    found: dict[str, Any] = {}
    dense: dict[str, Tensor] = {}
    reference: tuple[Tensor, Tensor] | None = None
    for name, arm, batches in [
        (DENSE.name, DENSE, draw),
        *((arm.name, arm, draw) for arm in arms if arm != DENSE),
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
        found[name] = {
            "steps": steps,
            "held-out loss": loss,
            "KL from dense": _divergence(states, reference, held_out),
            **distances(weights, dense, start),
        }
    _restore(model, start)
    return {"arms": found, "scale": asdict(scale)}


def train(
    model: Any, head: Tensor, batches: Sequence[Batch], arm: Arm, scale: Scale
) -> list[dict[str, float]]:
    """One step a batch: a record of each step's loss."""
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
    """Batches of words, responses sampled from the start model, and its states as the teacher."""
    rng, split = random.Random(seed), task.split_words()
    torch.manual_seed(seed)
    batches = []
    with evaluating(model):
        for _ in range(steps or scale.steps):
            some = rng.sample(list(words), size or scale.words)
            bare = [task.question(word) for word in some]
            informed = [
                task.feedback(word, split, rng, scale.num_examples) + question
                for word, question in zip(some, bare)
            ]
            responses, loss_mask = _sample(model, tokenizer, bare, scale.max_length)
            teacher_ids, teacher_mask = _with(tokenizer, informed, responses, loss_mask)
            forward = CompletionForward(model, teacher_ids, teacher_mask, responses.shape[1])
            hidden, _ = forward(with_head(outlives_forward=False))
            ids, mask = _with(tokenizer, bare, responses, loss_mask)
            batches.append(Batch(ids, mask, loss_mask, hidden))
    return batches


def distances(
    weights: dict[str, Tensor], dense: dict[str, Tensor], start: dict[str, Tensor]
) -> dict[str, float]:
    """How far weights are from the dense arm's, as a share of how far that one went."""

    def share(names: Sequence[str]) -> float:
        off = sum((weights[name] - dense[name]).square().sum().item() for name in names)
        went = sum((dense[name] - start[name]).square().sum().item() for name in names)
        return float((off / went) ** 0.5)

    return {"distance": share(list(start)), "head distance": share([HEAD])}


def _loss(model: Any, head: Tensor, batch: Batch, arm: Arm) -> Any:
    """SDPO's loss against the start model, whose head is a copy."""
    return _forward(model, batch)(
        lambda hidden, student_head: sdpo_loss(
            hidden,
            student_head,
            batch.teacher,
            head,
            token_weights=batch.loss_mask.to(hidden.dtype),
            temperature=TEMPERATURE,
            reduction="mean",
            metrics=("student_entropy",),
            **arm.choice,
        )
    )


def _forward(model: Any, batch: Batch) -> CompletionForward:
    return CompletionForward(model, batch.ids, batch.mask, batch.teacher.shape[1])


def _divergence(
    states: tuple[Tensor, Tensor], reference: tuple[Tensor, Tensor], batch: Batch
) -> float:
    """Mean KL of the reference's distributions from those of states (B, T, D) and head (V, D)."""
    weights = batch.loss_mask.to(states[0].dtype)
    return divergence_loss(
        *states,
        *reference,
        divergence="forward_kl",
        temperature=TEMPERATURE,
        token_weights=weights,
        reduction="mean",
    ).loss.item()


def _sample(
    model: Any, tokenizer: Any, prompts: Sequence[str], length: int
) -> tuple[Tensor, Tensor]:
    """Sampled responses (B, T), and a mask up to their ends, the ends included."""
    batch = tokenizer(list(prompts), return_tensors="pt", padding=True).to(model.device)
    ends = model.generation_config.eos_token_id
    generated = model.generate(
        **batch,
        do_sample=True,
        temperature=TEMPERATURE,
        top_k=0,
        max_new_tokens=length,
        eos_token_id=ends,
        pad_token_id=tokenizer.pad_token_id,
    )
    ids = generated[:, batch["input_ids"].shape[1] :]
    is_end = torch.isin(ids, torch.tensor(ends, device=ids.device))
    return ids, (is_end.cumsum(1) - is_end.long() == 0).long()


def _with(
    tokenizer: Any, prompts: Sequence[str], responses: Tensor, mask: Tensor
) -> tuple[Tensor, Tensor]:
    """Prompts, padded on the left, before the responses: ids and mask (B, L)."""
    batch = tokenizer(list(prompts), return_tensors="pt", padding=True).to(responses.device)
    ids = torch.cat([batch["input_ids"], responses], 1)
    return ids, torch.cat([batch["attention_mask"], mask], 1)


def _weights(model: Any) -> dict[str, Tensor]:
    """Copies of all weights by name; a tied head goes by the head's."""
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
