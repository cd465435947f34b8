"""Answers of the model, and what the teacher says about each of their tokens.

Teacher and student are one set of weights, the teacher without the adapter.

Dimension key:  B completions, T tokens of the longest
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch

from fused_sd.credit import CreditRow, credit_measures


@contextmanager
def evaluating(model: Any, *, as_teacher: bool = False) -> Iterator[None]:
    """Evaluation mode without gradients; as the teacher also without the adapter."""
    was_training = model.training
    model.eval()
    with torch.no_grad(), model.disable_adapter() if as_teacher else nullcontext():
        yield
    model.train(was_training)


def complete(
    model: Any, tokenizer: Any, prompts: Sequence[str], max_new_tokens: int
) -> list[list[int]]:
    """Greedy completions as token ids, cut after the end of the line."""
    batch = tokenizer(list(prompts), return_tensors="pt", padding=True).to(model.device)
    ends = model.generation_config.eos_token_id
    generated = model.generate(
        **batch,
        max_new_tokens=max_new_tokens,
        do_sample=False,
        eos_token_id=ends,
        pad_token_id=tokenizer.pad_token_id,
    )
    completions = generated[:, batch["input_ids"].shape[1] :].tolist()
    return [_cut(ids, ends) for ids in completions]


def completion_credit(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    teacher_prompts: Sequence[str],
    completions: Sequence[list[int]],
) -> tuple[CreditRow, ...]:
    """The teacher's opinion of every token of B completions.

    Args:
        model: with an adapter.
        tokenizer: pads on the left.
        prompts: what the student reads.
        teacher_prompts: what the teacher reads.
        completions: token ids.
    """
    from fused_sd.integrations.shared.completion_scores import CompletionForward, with_head
    from fused_sd.integrations.transformers import attach

    attach(model)
    length = max(len(ids) for ids in completions)

    def forward(texts: Sequence[str]) -> CompletionForward:
        rows = [tokenizer(text)["input_ids"] + ids for text, ids in zip(texts, completions)]
        batch = tokenizer.pad({"input_ids": rows}, return_tensors="pt").to(model.device)
        return CompletionForward(model, batch["input_ids"], batch["attention_mask"], length)

    # padding is on the left, so every completion ends at the last position
    token_ids = torch.tensor([[0] * (length - len(ids)) + ids for ids in completions])
    mask = torch.tensor([[0] * (length - len(ids)) + [1] * len(ids) for ids in completions])
    token_ids, mask = token_ids.to(model.device), mask.to(model.device)
    with evaluating(model, as_teacher=True):
        teacher_hidden, teacher_head = forward(teacher_prompts)(with_head(outlives_forward=False))
    with evaluating(model):
        measures = forward(prompts)(
            lambda hidden, head: credit_measures(
                hidden, head, teacher_hidden, teacher_head.beside(head), token_ids, mask=mask
            )
        )
    return measures.as_map(token_ids, mask, decode=tokenizer.decode).rows


def _cut(ids: list[int], ends: list[int]) -> list[int]:
    for n, token_id in enumerate(ids):
        if token_id in ends:
            return ids[: n + 1]
    return ids
