"""Evaluation of a model: answers, lengths, entropies and leaks.

Dimension key:  B questions, T response tokens, V vocabulary
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from benchmarks.methods.tasks import Prompt, Question, Task

BATCH = 512
ENTROPY_QUESTIONS = 128
TOKEN_TYPES = "mm_token_type_ids"  # which tokens are an image's
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


def end_ids(model: Any, processor: Any) -> list[int]:
    """Return the ids of all tokens that end a response."""
    tokenizer = tokenizer_of(processor)
    known = model.generation_config.eos_token_id
    listed = known if isinstance(known, list) else [] if known is None else [known]
    return sorted({tokenizer.eos_token_id, *listed})


def tokenizer_of(processor: Any) -> Any:
    """Return the tokenizer of a processor, or the tokenizer that it is."""
    return getattr(processor, "tokenizer", processor)


def encoded(processor: Any, prompts: Sequence[Prompt]) -> dict[str, Tensor]:
    """Return a model's inputs for prompts: all are texts, or all are conversations."""
    if isinstance(prompts[0], str):
        batch = tokenizer_of(processor)(list(prompts), return_tensors="pt", padding=True)
        return {name: batch[name] for name in ("input_ids", "attention_mask")}
    batch = processor.apply_chat_template(
        list(prompts),
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        processor_kwargs={"return_tensors": "pt", "padding": True},
    )
    return dict(batch)


def respond(
    model: Any,
    processor: Any,
    prompts: Sequence[Prompt],
    max_tokens: int,
    *,
    temperature: float | None = None,
    seed: int = SAMPLING_SEED,
) -> Responses:
    """Generate responses.

    Args:
        model: The model, with or without an adapter.
        processor: Its tokenizer or processor, which pads on the left.
        prompts: What precedes the responses: texts, or conversations with images.
        max_tokens: The most tokens of a response, its end token included.
        temperature: The sampling temperature; None: greedy responses.
        seed: The seed of the sampling.
    """
    ends, pad = end_ids(model, processor), tokenizer_of(processor).pad_token_id
    ids = torch.full((len(prompts), max_tokens), pad)
    sampling: dict[str, Any] = {"do_sample": False}
    if temperature is not None:
        sampling = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
    if not isinstance(prompts[0], str):
        # the trainers do so, too: a sampled token of an image has no image
        sampling["suppress_tokens"] = [model.config.image_token_id]
    with evaluating(model):
        torch.manual_seed(seed)
        for start in range(0, len(prompts), BATCH):
            batch = encoded(processor, prompts[start : start + BATCH])
            output = model.generate(
                **{name: value.to(model.device) for name, value in batch.items()},
                max_new_tokens=max_tokens,
                pad_token_id=pad,
                eos_token_id=ends,
                **sampling,
            )[:, batch["input_ids"].size(1) :].cpu()
            ids[start : start + BATCH, : output.size(1)] = output
    is_end = torch.isin(ids, torch.tensor(ends))
    mask = (is_end.cumsum(1) - is_end.long() == 0).long()
    kept = [row[keep.bool()].tolist() for row, keep in zip(ids, mask)]
    texts = tokenizer_of(processor).batch_decode(kept, skip_special_tokens=True)
    return Responses(texts, ids, mask)


def response_logits(
    model: Any, processor: Any, prompts: Sequence[Prompt], responses: Responses
) -> Tensor:
    """Return the fp32 logits (B, T, V) that predict the tokens of each response."""
    batch = encoded(processor, prompts)
    added = {"input_ids": responses.ids, "attention_mask": responses.mask}
    if TOKEN_TYPES in batch:
        added[TOKEN_TYPES] = torch.zeros_like(responses.ids)  # text
    batch |= {name: torch.cat([batch[name], behind], 1) for name, behind in added.items()}
    inputs = {name: value.to(model.device) for name, value in batch.items()}
    length = responses.ids.size(1)
    with evaluating(model):
        logits = model(**inputs, logits_to_keep=length + 1).logits
    return logits[:, :-1].float().cpu()


def mean_entropy(logits: Tensor, mask: Tensor) -> float:
    """Return the mean entropy, in nats, of the logits (B, T, V) where the mask (B, T) is 1."""
    log_probs = logits.log_softmax(-1)
    entropy = -(log_probs.exp() * log_probs).sum(-1)
    return float((entropy * mask).sum() / mask.sum())


def look(model: Any, processor: Any, task: Task, questions: Sequence[Question]) -> dict[str, Any]:
    """Evaluate a student: one point of each of its curves.

    Returns:
        ``accuracy``, the share of questions that are answered rightly by greedy answers; and of
        sampled answers ``sampled_accuracy``, ``length`` in tokens, ``entropy`` in nats, and
        ``leaks``, the share that speaks of a hint.
    """
    prompts = [question.shown for question in questions]
    asked = [question.verified_by for question in questions]
    greedy = respond(model, processor, prompts, task.max_response)
    drawn = respond(model, processor, prompts, task.max_response, temperature=1.0)
    some = slice(0, ENTROPY_QUESTIONS)
    part = Responses(drawn.texts[some], drawn.ids[some], drawn.mask[some])
    logits = response_logits(model, processor, prompts[some], part)
    return {
        "accuracy": share(map(task.is_right, asked, greedy.texts)),
        "sampled_accuracy": share(map(task.is_right, asked, drawn.texts)),
        "length": drawn.mean_length,
        "entropy": mean_entropy(logits, part.mask),
        "leaks": share(map(task.is_leaking, drawn.texts)),
    }


def share(verdicts: Iterable[bool]) -> float:
    """Return the share of true verdicts."""
    return fmean(map(float, verdicts))
