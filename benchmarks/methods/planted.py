"""Planted errors: one digit of a right answer is changed.  Does the teacher blame that digit?

A ``slip`` is any other digit, which a student rarely writes.  A ``likely`` error is the wrong digit
that the student finds most probable there, like the errors in its own responses.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor

from benchmarks.methods.evaluate import evaluating
from benchmarks.methods.tasks import Question
from benchmarks.methods.tasks.addition import HINTED, VERDICT, WRONG, with_wrong_digit
from fused_sd.credit import CreditRow, credit_map, planted_error_scores

NUM_QUESTIONS = 300
KINDS = ("slip", "likely")
CHANCE, ALONE = "chance", "student alone"


def judged(question: Question, attempt: str, end: str) -> str:
    """Return the context in which SD-Zero's second phase asks its reviser."""
    return question.prompt + attempt + end + VERDICT.format(WRONG)


# the teacher's context before the attempt, by the hint that it holds
TEACHERS: dict[str, Callable[[Question, str, str], str]] = {
    "verdict": judged,
    "answer": lambda asked, *_: HINTED.format(hint=asked.answer, question=asked.prompt),
    "solution": lambda asked, *_: HINTED.format(hint=asked.solution, question=asked.prompt),
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
    model: Any, tokenizer: Any, questions: Sequence[Question], kind: str, seed: int
) -> tuple[list[str], list[list[bool]]]:
    """Return attempts with one wrong digit each, and masks that are True at the wrong digit."""
    rng = random.Random(seed)
    right = [question.solution for question in questions]
    hidden, _ = states(model, tokenizer, [question.prompt for question in questions], right)
    digits = tokenizer.convert_tokens_to_ids(list("0123456789"))
    likeliness = (hidden @ model.lm_head.weight.detach().T)[..., digits].tolist()
    attempts, masks = [], []
    for solution, scores in zip(right, likeliness):
        attempt, place = with_wrong_digit(solution, rng)
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
    model: Any, tokenizer: Any, questions: Sequence[Question], seed: int
) -> dict[str, dict[str, Any]]:
    """Return how well a model, as its own teacher, finds the planted errors.

    Args:
        model: The student, and the teacher too.
        tokenizer: Its tokenizer.
        questions: Those of the addition task.
        seed: Draws the errors.

    Returns:
        The scores of the most blamed token, by kind of error and teacher.
    """
    questions = questions[:NUM_QUESTIONS]
    bare = [question.prompt for question in questions]
    head, end = model.lm_head.weight.detach(), tokenizer.eos_token
    scores: dict[str, dict[str, Any]] = {}
    for kind in KINDS:
        attempts, masks = plant(model, tokenizer, questions, kind, seed)
        student, ids = states(model, tokenizer, bare, attempts)
        found: dict[str, Any] = {}
        for name, context in TEACHERS.items():
            contexts = [context(*pair, end) for pair in zip(questions, attempts)]
            teacher, _ = states(model, tokenizer, contexts, attempts)
            rows = credit_map(student, head, teacher, head, ids, top=1).rows
            found[name] = asdict(planted_error_scores(rows, masks))
        found[ALONE] = asdict(planted_error_scores([alone(row) for row in rows], masks))
        share = found[ALONE]["num_planted"] / found[ALONE]["num_tokens"]
        found[CHANCE] = {"precision": share, "recall": share, "auroc": 0.5}
        scores[kind] = found
    return scores
