"""Searches for a right answer to single hard questions, with three ways at equal attempts.

A question is hard if many samples of the base model are all wrong.  The environment says only that
an attempt is wrong.

best of k           samples independently from the base model
multi-turn          the base model reads its last attempt and the verdict, and tries again
self-distillation   the model learns from its failures by test-time SDPO (arXiv 2601.20802)

The official code of the multi-turn baseline samples one response a turn and shows the feedback on
as many of the last attempts as fit, by default without the attempts.  Here the pre-training text
holds one attempt or two, and always with their verdicts: the model can do nothing with a verdict
alone.  So multi-turn shows the last attempt.  That is exactly the context of the self-distilling
teacher, and the two ways differ only in whether the model learns.
"""

import random
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import PrinterCallback

from benchmarks.methods.arms import Arm
from benchmarks.methods.evaluate import respond
from benchmarks.methods.experiments import Search
from benchmarks.methods.tasks import Question, Task
from benchmarks.methods.train import common_settings, load
from fused_sd.integrations import trl


def seed_of(*names: object) -> int:
    """Return a seed of 31 bits that belongs to these names alone."""
    return random.Random(" ".join(map(str, names))).getrandbits(31)


def first(verdicts: Sequence[bool]) -> int | None:
    """Return the number of the first success, counted from 1; None: there is none."""
    return verdicts.index(True) + 1 if True in verdicts else None


def attempts(
    model: Any, tokenizer: Any, task: Task, question: Question, count: int, seed: int
) -> list[bool]:
    """Return the verdicts on ``count`` responses that are sampled from a fixed model."""
    prompts = [question.prompt] * count
    drawn = respond(model, tokenizer, prompts, task.max_response, temperature=1.0, seed=seed)
    return [task.is_right(*pair) for pair in zip(prompts, drawn.texts)]


def hard_questions(
    model: Any, tokenizer: Any, task: Task, part: str, search: Search, seed: int
) -> list[Question]:
    """Return the first questions of a part that the base model fails in every sample.

    Raises:
        ValueError: The part has no hard question.
    """
    found: list[Question] = []
    for question in task.questions[part]:
        drawn = seed_of("hard", seed, question.prompt)
        if not any(attempts(model, tokenizer, task, question, search.hard_samples, drawn)):
            found.append(question)
        if len(found) == search.num_questions:
            break
    if not found:
        raise ValueError(
            f"a question of {part} must fail {search.hard_samples} times, got none of "
            f"{len(task.questions[part])}; draw fewer samples"
        )
    return found


def turn_prompt(question: Question, attempt: str, task: Task, arm: Arm) -> str:
    """Return the prompt of the turn after a wrong attempt: the teacher's, by the same template."""
    assert arm.template is not None
    assert task.feedback is not None
    said = task.feedback(question.prompt, attempt)
    assert said is not None
    template = task.templates[arm.template]
    shown = template["attempt_template"].format(attempt=attempt)
    shown += template["feedback_template"].format(feedback_raw=said)
    return template["reprompt_template"].format(prompt=question.prompt, solution="", feedback=shown)


def converse(
    model: Any,
    tokenizer: Any,
    task: Task,
    arm: Arm,
    questions: Sequence[Question],
    *,
    max_attempts: int,
    seed: int,
) -> list[int | None]:
    """Return the number of the first right turn of a conversation about each question."""
    found: list[int | None] = [None] * len(questions)
    prompts = {number: question.prompt for number, question in enumerate(questions)}
    for turn in range(1, max_attempts + 1):
        drawn = respond(
            model,
            tokenizer,
            list(prompts.values()),
            task.max_response,
            temperature=1.0,
            seed=seed_of("turn", seed, turn),
        )
        for number, text in zip(list(prompts), drawn.texts):
            question = questions[number]
            if task.is_right(question.prompt, text):
                found[number] = turn
                del prompts[number]
            else:
                prompts[number] = turn_prompt(question, text, task, arm)
        if not prompts:
            break
    return found


def distil(
    task: Task,
    arm: Arm,
    question: Question,
    *,
    rate: float,
    seed: int,
    max_attempts: int,
    cache: Path,
) -> int | None:
    """Let the base model learn from its failures; return the number of the first right attempt."""
    assert arm.trainer is not None
    assert arm.template is not None
    model, tokenizer = load(task, cache)
    drawn = seed_of("distil", seed, question.prompt)
    with tempfile.TemporaryDirectory() as output:
        trainer = getattr(trl, arm.trainer)(
            model=model,
            reward_funcs=task.reward,
            args=getattr(trl, arm.config)(
                max_attempts=max_attempts,
                learning_rate=rate,
                lr_scheduler_type="constant",
                max_completion_length=task.max_response,
                observe=False,
                **common_settings(drawn, output),
                **task.templates[arm.template],
                **arm.settings,
            ),
            train_dataset=Dataset.from_list([{"prompt": question.prompt}]),
            processing_class=tokenizer,
            feedback_func=task.said,
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return trainer.first_success


def run(
    task: Task,
    arm: Arm,
    rate: float | None,
    seed: int,
    search: Search,
    cache: Path,
    *,
    part: str,
) -> dict[str, Any]:
    """Search for the answers to a unit's hard questions in one way.

    The questions depend on the base model, the seed and the part alone: all ways have the same.

    Args:
        task: The task, which gives feedback.
        arm: The way.
        rate: The learning rate; None: the model is not trained.
        seed: The unit's seed.
        search: The size of the search.
        cache: The folder of the base models.
        part: The part of the questions.

    Returns:
        ``questions``: the prompts of the hard questions; ``first_success``: for each the number of
        the first right attempt, None if there is none; ``probability``: for 16, 32, ... attempts
        the share of questions that were answered within them; ``seconds``: the time of the search.
    """
    model, tokenizer = load(task, cache)
    questions = hard_questions(model, tokenizer, task, part, search, seed)
    most, started = search.max_attempts, time.perf_counter()
    if rate is not None:
        found = [
            distil(task, arm, question, rate=rate, seed=seed, max_attempts=most, cache=cache)
            for question in questions
        ]
    elif arm.template is not None:
        found = converse(model, tokenizer, task, arm, questions, max_attempts=most, seed=seed)
    else:
        # fresh samples: those that made the questions hard are all wrong
        found = [
            first(
                attempts(
                    model, tokenizer, task, question, most, seed_of("fresh", seed, question.prompt)
                )
            )
            for question in questions
        ]
    return {
        "questions": [question.prompt for question in questions],
        "first_success": found,
        "probability": {count: trl.discovery_probability(found, count) for count in search.counts},
        "seconds": time.perf_counter() - started,
    }
