"""Evaluation of a model: answers, lengths, entropies and leaks.

Dimension key:  B questions, T response tokens, V vocabulary
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.methods.task import Question, Task

BATCH = 512
ENTROPY_QUESTIONS = 128
SAMPLING_SEED = 99  # one seed for all evaluations, so that they can be compared


@dataclass(frozen=True)
class Responses:
    """A model's answers, on the CPU.

    Attributes:
        texts: The answers without special tokens.
        ids: The generated tokens (B, T), padded after the end.
        mask: 1 up to the end token, inclusive, and 0 behind it (B, T).
    """

    texts: list[str]
    ids: Tensor
    mask: Tensor

    @property
    def mean_length(self) -> float:
        """Mean tokens of a response, its end token included."""
        return float(self.mask.sum(1).float().mean())


@contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """Switch off gradients and dropout, and leave training's random state as it is."""
    was_training = model.training
    devices = [model.device] if model.device.type == "cuda" else []
    model.eval()
    with torch.no_grad(), torch.random.fork_rng(devices=devices):
        yield
    model.train(was_training)


def end_ids(model: Any, tokenizer: Any) -> list[int]:
    """Return the ids of all tokens that end a response."""
    known = model.generation_config.eos_token_id
    listed = known if isinstance(known, list) else [] if known is None else [known]
    return sorted({tokenizer.eos_token_id, *listed})


def respond(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    max_tokens: int,
    *,
    temperature: float | None = None,
    seed: int = SAMPLING_SEED,
) -> Responses:
    """Generate responses.

    Args:
        model: The model, with or without an adapter.
        tokenizer: Its tokenizer, which pads on the left.
        prompts: The texts that precede the responses.
        max_tokens: The most tokens of a response, its end token included.
        temperature: The sampling temperature; None: greedy responses.
        seed: The seed of the sampling.
    """
    ends = end_ids(model, tokenizer)
    ids = torch.full((len(prompts), max_tokens), tokenizer.pad_token_id)
    sampling: dict[str, Any] = {"do_sample": False}
    if temperature is not None:
        sampling = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
    with evaluating(model):
        torch.manual_seed(seed)
        for start in range(0, len(prompts), BATCH):
            batch = tokenizer(
                list(prompts[start : start + BATCH]), return_tensors="pt", padding=True
            ).to(model.device)
            output = model.generate(
                input_ids=batch["input_ids"],
                attention_mask=batch["attention_mask"],
                max_new_tokens=max_tokens,
                pad_token_id=tokenizer.pad_token_id,
                eos_token_id=ends,
                **sampling,
            )[:, batch["input_ids"].size(1) :].cpu()
            ids[start : start + BATCH, : output.size(1)] = output
    is_end = torch.isin(ids, torch.tensor(ends))
    mask = (is_end.cumsum(1) - is_end.long() == 0).long()
    kept = [row[keep.bool()].tolist() for row, keep in zip(ids, mask)]
    return Responses(tokenizer.batch_decode(kept, skip_special_tokens=True), ids, mask)


def response_logits(
    model: Any, tokenizer: Any, prompts: Sequence[str], responses: Responses
) -> Tensor:
    """Return the fp32 logits (B, T, V) that predict the tokens of each response."""
    batch = tokenizer(list(prompts), return_tensors="pt", padding=True)
    ids = torch.cat([batch["input_ids"], responses.ids], 1).to(model.device)
    mask = torch.cat([batch["attention_mask"], responses.mask], 1).to(model.device)
    length = responses.ids.size(1)
    with evaluating(model):
        logits = model(input_ids=ids, attention_mask=mask, logits_to_keep=length + 1).logits
    return logits[:, :-1].float().cpu()


def mean_entropy(logits: Tensor, mask: Tensor) -> float:
    """Return the mean entropy, in nats, of the logits (B, T, V) where the mask (B, T) is 1."""
    log_probs = logits.log_softmax(-1)
    entropy = -(log_probs.exp() * log_probs).sum(-1)
    return float((entropy * mask).sum() / mask.sum())


def look(model: Any, tokenizer: Any, task: Task, questions: Sequence[Question]) -> dict[str, Any]:
    """Evaluate a student: one point of each of its curves.

    Returns:
        ``right``, a string with "1" or "0" for each question answered greedily; the mean of it,
        ``accuracy``; and of sampled answers ``sampled_accuracy``, ``length`` in tokens, ``entropy``
        in nats, and ``leaks``, the share that speaks of a hint.
    """
    prompts = [question.prompt for question in questions]
    greedy = respond(model, tokenizer, prompts, task.max_response)
    drawn = respond(model, tokenizer, prompts, task.max_response, temperature=1.0)
    some = slice(0, ENTROPY_QUESTIONS)
    part = Responses(drawn.texts[some], drawn.ids[some], drawn.mask[some])
    logits = response_logits(model, tokenizer, prompts[some], part)
    right = [task.is_right(*pair) for pair in zip(prompts, greedy.texts)]
    sampled = [task.is_right(*pair) for pair in zip(prompts, drawn.texts)]
    return {
        "right": "".join(str(int(entry)) for entry in right),
        "accuracy": sum(right) / len(right),
        "sampled_accuracy": sum(sampled) / len(sampled),
        "length": drawn.mean_length,
        "entropy": mean_entropy(logits, part.mask),
        "leaks": sum(map(task.is_leaking, drawn.texts)) / len(drawn.texts),
    }
