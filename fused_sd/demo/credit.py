"""What the teacher says about each token the student wrote.

Credit is ``log P_teacher(token) - log P_student(token)``: above 0 the examples make the token more
likely, below 0 less.  Teacher and student are one set of weights, the teacher without the adapter.

Dimension key:  B completions, L tokens of a completion, V vocabulary
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class TokenCredit:
    """One token of a completion under both distributions."""

    token: str
    student_log_prob: float
    teacher_log_prob: float
    kl: float  # KL(teacher || student) over the whole vocabulary, in nats
    student_entropy: float  # in nats
    student_top: list[tuple[str, float]]  # the three likeliest tokens and their probabilities
    teacher_top: list[tuple[str, float]]

    @property
    def credit(self) -> float:
        return self.teacher_log_prob - self.student_log_prob

    def as_dict(self) -> dict[str, Any]:
        return asdict(self) | {"credit": self.credit}


@contextmanager
def evaluating(model: Any, *, as_teacher: bool = False) -> Iterator[None]:
    """Evaluation mode without gradients; as the teacher also without the adapter."""
    was_training = model.training
    model.eval()
    with torch.no_grad(), model.disable_adapter() if as_teacher else nullcontext():
        yield
    model.train(was_training)


def completion_log_probs(
    model: Any, tokenizer: Any, prompts: Sequence[str], completions: Sequence[list[int]]
) -> list[Tensor]:
    """Log-probabilities over the vocabulary at every completion token: B tensors of (L, V)."""
    rows = [tokenizer(prompt)["input_ids"] + ids for prompt, ids in zip(prompts, completions)]
    batch = tokenizer.pad({"input_ids": rows}, return_tensors="pt").to(model.device)
    longest = max(len(ids) for ids in completions)
    logits = model(**batch, logits_to_keep=longest + 1).logits
    # padding is on the left, so every completion ends at the last position; logits at n are for n+1
    return [
        row[-len(ids) - 1 : -1].float().log_softmax(-1) for row, ids in zip(logits, completions)
    ]


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


def token_credits(
    tokenizer: Any,
    completion: list[int],
    student: Tensor,  # (L, V) log-probabilities
    teacher: Tensor,  # (L, V)
) -> list[TokenCredit]:
    """The credit of every token of one completion."""
    ratio = teacher - student
    kl = (teacher.exp() * ratio).sum(-1)
    entropy = -(student.exp() * student).sum(-1)
    return [
        TokenCredit(
            token=tokenizer.decode([token_id]),
            student_log_prob=student[n, token_id].item(),
            teacher_log_prob=teacher[n, token_id].item(),
            kl=kl[n].item(),
            student_entropy=entropy[n].item(),
            student_top=_top_tokens(tokenizer, student[n]),
            teacher_top=_top_tokens(tokenizer, teacher[n]),
        )
        for n, token_id in enumerate(completion)
    ]


def _top_tokens(tokenizer: Any, log_probs: Tensor, count: int = 3) -> list[tuple[str, float]]:
    top = log_probs.topk(count)
    return [
        (tokenizer.decode([token_id]), value)
        for token_id, value in zip(top.indices.tolist(), top.values.exp().tolist())
    ]


def _cut(ids: list[int], ends: list[int]) -> list[int]:
    for n, token_id in enumerate(ids):
        if token_id in ends:
            return ids[: n + 1]
    return ids
