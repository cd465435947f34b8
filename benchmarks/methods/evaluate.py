"""Asking a model: answers, lengths, entropies, leaks.

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
SAMPLING_SEED = 99  # the same draws at every look, so that looks can be compared


@dataclass(frozen=True)
class Responses:
    """What a model answered.

    Attributes:
        texts: without special tokens.
        ids: (B, T) as generated, padded after the end.
        mask: (B, T) 1 up to the end, the end included.
    """

    texts: list[str]
    ids: Tensor
    mask: Tensor

    @property
    def mean_length(self) -> float:
        """Tokens of a response, its end included."""
        return float(self.mask.sum(1).float().mean())


@contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """Without gradient or dropout, and without touching the training's random numbers."""
    was_training = model.training
    devices = [model.device] if model.device.type == "cuda" else []
    model.eval()
    with torch.no_grad(), torch.random.fork_rng(devices=devices):
        yield
    model.train(was_training)


def end_ids(model: Any, tokenizer: Any) -> list[int]:
    """Tokens that end a response."""
    known = model.generation_config.eos_token_id
    listed = known if isinstance(known, list) else [] if known is None else [known]
    return sorted({tokenizer.eos_token_id, *listed})


def respond(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    max_tokens: int,
    *,
    sample: bool = False,
    seed: int = SAMPLING_SEED,
) -> Responses:
    """Greedy responses, or responses sampled at temperature 1."""
    ends = end_ids(model, tokenizer)
    ids = torch.full((len(prompts), max_tokens), tokenizer.pad_token_id)
    choice = {"do_sample": True, "top_k": 0, "top_p": 1.0} if sample else {"do_sample": False}
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
                **choice,
            )[:, batch["input_ids"].size(1) :].cpu()
            ids[start : start + BATCH, : output.size(1)] = output
    is_end = torch.isin(ids, torch.tensor(ends))
    mask = (is_end.cumsum(1) - is_end.long() == 0).long()  # an end counts, what follows does not
    kept = [row[keep.bool()].tolist() for row, keep in zip(ids, mask)]
    return Responses(tokenizer.batch_decode(kept, skip_special_tokens=True), ids, mask)


def response_logits(
    model: Any, tokenizer: Any, prompts: Sequence[str], responses: Responses
) -> Tensor:
    """Logits (B, T, V) of each response's tokens after its prompt."""
    batch = tokenizer(list(prompts), return_tensors="pt", padding=True)
    ids = torch.cat([batch["input_ids"], responses.ids], 1).to(model.device)
    mask = torch.cat([batch["attention_mask"], responses.mask], 1).to(model.device)
    length = responses.ids.size(1)
    with evaluating(model):
        logits = model(input_ids=ids, attention_mask=mask, logits_to_keep=length + 1).logits
    return logits[:, :-1].float().cpu()


def mean_entropy(logits: Tensor, mask: Tensor) -> float:
    """Mean entropy, in nats, of the distributions that the mask (B, T) counts."""
    log_probs = logits.log_softmax(-1)
    entropy = -(log_probs.exp() * log_probs).sum(-1)
    return float((entropy * mask).sum() / mask.sum())


def look(model: Any, tokenizer: Any, task: Task, questions: Sequence[Question]) -> dict[str, Any]:
    """One look at a student: what the curves hold for a step."""
    prompts = [asked.prompt for asked in questions]
    greedy = respond(model, tokenizer, prompts, task.max_response)
    drawn = respond(model, tokenizer, prompts, task.max_response, sample=True)
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


def accuracy(
    model: Any,
    tokenizer: Any,
    task: Task,
    questions: Sequence[Question],
    contexts: Sequence[str] | None = None,
) -> float:
    """Share of the questions answered rightly, greedily; contexts stand for the bare prompts."""
    prompts = [asked.prompt for asked in questions]
    said = respond(model, tokenizer, contexts or prompts, task.max_response).texts
    return sum(task.is_right(*pair) for pair in zip(prompts, said)) / len(prompts)
