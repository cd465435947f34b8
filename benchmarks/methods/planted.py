"""Planted errors: one digit of a right answer is changed.  Does the teacher blame that digit?

A ``slip`` is any other digit, which a student rarely writes.  A ``likely`` error is the wrong digit
that the student finds most probable there, like the errors in its own responses.
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
# the teacher's context before the attempt, by the hint that it holds
TEACHERS: dict[str, Callable[[Sum, str], str]] = {
    "verdict": lambda pair, attempt: pair.question + attempt + VERDICT.format(WRONG),
    "answer": lambda pair, attempt: HINTED.format(hint=pair.answer, question=pair.question),
    "solution": lambda pair, attempt: HINTED.format(hint=pair.solution, question=pair.question),
}


def states(
    model: Any, tokenizer: Any, contexts: Sequence[str], attempts: Sequence[str]
) -> tuple[Tensor, Tensor]:
    """Return the hidden states (B, T, D) that predict the attempts' tokens, and the tokens (B, T).

    All contexts must have one length, and all attempts, too.
    """
    ids = torch.tensor(tokenizer([c + a for c, a in zip(contexts, attempts)])["input_ids"])
    length = len(tokenizer(attempts[0])["input_ids"])
    with evaluating(model):
        hidden = model.model(input_ids=ids.to(model.device)).last_hidden_state
    return hidden[:, -length - 1 : -1], ids[:, -length:].to(model.device)


def plant(
    model: Any, tokenizer: Any, pairs: Sequence[Sum], kind: str, seed: int
) -> tuple[list[str], list[list[bool]]]:
    """Return attempts with one wrong digit each, and masks that are True at the wrong digit."""
    rng = random.Random(seed)
    right = [pair.solution for pair in pairs]
    hidden, _ = states(model, tokenizer, [pair.question for pair in pairs], right)
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
    """Replace a row's blame by the student's own surprise -log P_S, which needs no teacher."""
    tokens = [
        replace(token, teacher_log_prob=token.student_log_prob, student_log_prob=0.0)
        for token in row.tokens
    ]
    return replace(row, tokens=tuple(tokens))


def score(
    task: Task, seed: int, cache: Path, num_questions: int = NUM_QUESTIONS
) -> dict[str, dict[str, Any]]:
    """Return the scores of the most blamed token, by kind of error and teacher."""
    model, tokenizer = load(task, seed, cache)
    pairs = arithmetic.splits()["held_out"][:num_questions]
    bare = [pair.question for pair in pairs]
    head = model.lm_head.weight.detach()
    scores: dict[str, dict[str, Any]] = {}
    for kind in KINDS:
        attempts, masks = plant(model, tokenizer, pairs, kind, seed)
        student, ids = states(model, tokenizer, bare, attempts)
        found: dict[str, Any] = {}
        for name, context in TEACHERS.items():
            contexts = [context(*pair) for pair in zip(pairs, attempts)]
            teacher, _ = states(model, tokenizer, contexts, attempts)
            rows = credit_map(student, head, teacher, head, ids, top=1).rows
            found[name] = asdict(planted_error_scores(rows, masks))
        found[ALONE] = asdict(planted_error_scores([alone(row) for row in rows], masks))
        share = found[ALONE]["num_planted"] / found[ALONE]["num_tokens"]
        found[CHANCE] = {"precision": share, "recall": share, "auroc": 0.5}
        scores[kind] = found
    return scores
