"""What a model can do as its own reviser: correct its responses, and find errors in them."""

from collections.abc import Sequence
from typing import Any

from benchmarks.methods import planted
from benchmarks.methods.evaluate import respond, share
from benchmarks.methods.tasks import Question, Task
from fused_sd.integrations.shared.revision_phrases import DELIMITER, Phrases


def phrases(task: Task) -> Phrases:
    """Return the verdicts that a task's model knows."""
    settings = task.templates["verdict"]
    return Phrases(settings["correct_phrase"], settings["wrong_phrase"])


def judge(
    model: Any, tokenizer: Any, task: Task, questions: Sequence[Question], seed: int
) -> dict[str, Any]:
    """Measure a model as its own reviser.

    Returns:
        ``revision``, of whole responses, as phase 2 asks the reviser; ``attempt_revision``, of
        their first attempts, as phase 1 trains it: see ``revision_scores``; and on addition
        ``planted``, see ``planted.score``.
    """
    prompts = [question.prompt for question in questions]
    answers = respond(model, tokenizer, prompts, task.max_response).texts
    attempts = [answer.split(DELIMITER)[0] for answer in answers]
    scores: dict[str, Any] = {
        "revision": revision_scores(model, tokenizer, task, prompts, answers),
        "attempt_revision": revision_scores(model, tokenizer, task, prompts, attempts),
    }
    if task.name.startswith("addition"):
        scores["planted"] = planted.score(model, tokenizer, questions, seed)
    return scores


def revision_scores(
    model: Any, tokenizer: Any, task: Task, prompts: Sequence[str], answers: Sequence[str]
) -> dict[str, float | None]:
    """Return the accuracies of answers and of their greedy revisions.

    Returns:
        ``first``, the share of right answers; ``revised``, that of right revisions; ``corrected``
        and ``kept``, the shares of wrong and of right answers whose revision is right, or None
        where there is no such answer.
    """
    right = [task.is_right(*pair) for pair in zip(prompts, answers)]
    contexts = [
        prompt + answer + DELIMITER + phrases(task).after(is_right) + DELIMITER
        for prompt, answer, is_right in zip(prompts, answers, right)
    ]
    revisions = respond(model, tokenizer, contexts, task.max_response).texts
    revised = [task.is_right(*pair) for pair in zip(prompts, revisions)]
    of_wrong = [after for before, after in zip(right, revised) if not before]
    of_right = [after for before, after in zip(right, revised) if before]
    return {
        "first": share(right),
        "revised": share(revised),
        "corrected": share(of_wrong) if of_wrong else None,
        "kept": share(of_right) if of_right else None,
    }
