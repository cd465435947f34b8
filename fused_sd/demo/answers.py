"""Let the model answer, and measure how the teacher judges each token of the answers.

Student and teacher share their weights: the student is the model with its adapter, the teacher the
model without it.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from fused_sd.credit import CreditRow, credit_measures


@contextmanager
def evaluating(model: Any, *, as_teacher: bool = False) -> Iterator[None]:
    """Turn off training mode and gradients and, for the teacher, the adapter."""
    was_training = model.training
    model.eval()
    with torch.no_grad(), model.disable_adapter() if as_teacher else nullcontext():
        yield
    model.train(was_training)


def complete(
    model: Any, tokenizer: Any, prompts: Sequence[str], max_new_tokens: int
) -> list[list[int]]:
    """Return greedy completions as token ids, each cut behind the end of its line."""
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
    return [_cut_behind_end(ids, ends) for ids in completions]


def completion_credit(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    teacher_prompts: Sequence[str],
    completions: Sequence[list[int]],
) -> tuple[CreditRow, ...]:
    """Measure the credit of every token of the completions.

    Args:
        model: a PEFT model; without its adapter it is the teacher.
        tokenizer: its tokenizer.
        prompts: the student's prompts.
        teacher_prompts: the teacher's prompts.
        completions: token ids of the completions.
    """
    from fused_sd.integrations.shared.completion_scores import CompletionForward, with_head
    from fused_sd.integrations.transformers import attach

    attach(model)

    def padded(rows: list[list[int]], side: str) -> tuple[Tensor, Tensor]:
        batch = tokenizer.pad({"input_ids": rows}, return_tensors="pt", padding_side=side)
        return batch["input_ids"].to(model.device), batch["attention_mask"].to(model.device)

    token_ids, mask = padded([list(ids) for ids in completions], "right")

    def forward(texts: Sequence[str]) -> CompletionForward:
        ids, is_prompt = padded([tokenizer(text)["input_ids"] for text in texts], "left")
        whole, known = torch.cat([ids, token_ids], 1), torch.cat([is_prompt, mask], 1)
        return CompletionForward(model, whole, known, token_ids.shape[1])

    with evaluating(model, as_teacher=True):
        teacher_hidden, teacher_head = forward(teacher_prompts)(with_head(outlives_forward=False))
    with evaluating(model):
        measures = forward(prompts)(
            lambda hidden, head: credit_measures(
                hidden, head, teacher_hidden, teacher_head.beside(head), token_ids, mask=mask
            )
        )
    return measures.as_map(token_ids, mask, decode=tokenizer.decode).rows


def _cut_behind_end(ids: list[int], ends: list[int]) -> list[int]:
    length = next((n + 1 for n, token_id in enumerate(ids) if token_id in ends), len(ids))
    return ids[:length]
