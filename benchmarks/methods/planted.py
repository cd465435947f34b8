"""Does the teacher blame the wrong digit?  Right answers with one digit changed, and the rest kept.

A ``slip`` is any other digit, which a student rarely writes; a ``likely`` error is the other digit
that this student finds likeliest there, as errors on its own responses are.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.methods import arithmetic
from benchmarks.methods.arithmetic import HINTED, VERDICT, WRONG, Sum
from benchmarks.methods.evaluate import evaluating
from benchmarks.methods.task import Task
from benchmarks.methods.train import load
from fused_sd.credit import CreditRow, credit_map, planted_error_scores

NUM_QUESTIONS = 300
KINDS = ("slip", "likely")
CHANCE, ALONE = "chance", "student alone"
# what the teacher reads before the attempt, by what it knows
TEACHERS: dict[str, Callable[[Sum, str], str]] = {
    "verdict": lambda asked, attempt: asked.question + attempt + VERDICT.format(WRONG),
    "answer": lambda asked, attempt: HINTED.format(hint=asked.answer, question=asked.question),
    "solution": lambda asked, attempt: HINTED.format(hint=asked.solution, question=asked.question),
}


def states(
    model: Any, tokenizer: Any, contexts: Sequence[str], attempts: Sequence[str]
) -> tuple[Tensor, Tensor]:
    """States (B, T, D) that predict the attempts' tokens, and those tokens (B, T).

    Contexts are as long as each other, and so are the attempts.
    """
    ids = torch.tensor(tokenizer([c + a for c, a in zip(contexts, attempts)])["input_ids"])
    length = len(tokenizer(attempts[0])["input_ids"])
    with evaluating(model):
        hidden = model.model(input_ids=ids.to(model.device)).last_hidden_state
    return hidden[:, -length - 1 : -1], ids[:, -length:].to(model.device)


def plant(
    model: Any, tokenizer: Any, asked: Sequence[Sum], kind: str, seed: int
) -> tuple[list[str], list[list[bool]]]:
    """Attempts with one wrong digit each, of a kind in ``KINDS``, and masks that mark it."""
    rng = random.Random(seed)
    right = [question.solution for question in asked]
    hidden, _ = states(model, tokenizer, [question.question for question in asked], right)
    digits = tokenizer.convert_tokens_to_ids(list("0123456789"))
    likeliness = (hidden @ model.lm_head.weight.detach().T)[..., digits].tolist()
    attempts, masks = [], []
    for solution, scores in zip(right, likeliness):
        attempt, place = arithmetic.with_wrong_digit(solution, rng)
        if kind == "likely":
            others = [digit for digit in range(10) if digit != int(solution[place])]
            digit = max(others, key=lambda other: scores[place][other])
            attempt = solution[:place] + str(digit) + solution[place + 1 :]
        attempts.append(attempt)
        masks.append([position == place for position in range(len(attempt))])
    return attempts, masks


def alone(row: CreditRow) -> CreditRow:
    """A row whose blame is the student's own surprise, -log P_S: what no teacher is needed for."""
    tokens = [
        replace(token, teacher_log_prob=token.student_log_prob, student_log_prob=0.0)
        for token in row.tokens
    ]
    return replace(row, tokens=tuple(tokens))


def score(
    task: Task, seed: int, cache: Path, num_questions: int = NUM_QUESTIONS
) -> dict[str, dict[str, Any]]:
    """By kind of error and teacher: precision, recall and others of the most blamed token."""
    model, tokenizer = load(task, seed, cache)
    asked = arithmetic.splits()["held_out"][:num_questions]
    bare = [question.question for question in asked]
    head = model.lm_head.weight.detach()
    scores: dict[str, dict[str, Any]] = {}
    for kind in KINDS:
        attempts, masks = plant(model, tokenizer, asked, kind, seed)
        student, ids = states(model, tokenizer, bare, attempts)
        found: dict[str, Any] = {}
        for name, context in TEACHERS.items():
            contexts = [context(*pair) for pair in zip(asked, attempts)]
            teacher, _ = states(model, tokenizer, contexts, attempts)
            rows = credit_map(student, head, teacher, head, ids, top=1).rows
            found[name] = asdict(planted_error_scores(rows, masks))
        found[ALONE] = asdict(planted_error_scores([alone(row) for row in rows], masks))
        share = found[ALONE]["num_planted"] / found[ALONE]["num_tokens"]
        found[CHANCE] = {"precision": share, "recall": share, "auroc": 0.5}
        scores[kind] = found
    return scores
