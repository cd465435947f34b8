"""Test-time self-distillation on single hard questions, against best-of-k of the base model.

A question is hard if many samples of the base model are all wrong.  The trainer gets the verdict
on each attempt and nothing else.
"""

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import PrinterCallback

from benchmarks.methods import arithmetic
from benchmarks.methods.evaluate import respond
from benchmarks.methods.settings import Discovery
from benchmarks.methods.task import Question, Task
from benchmarks.methods.train import device, load
from fused_sd.integrations.trl import DiscoveryConfig, DiscoveryTrainer

FRESH_SEED = 1_000_000  # no other part of the experiment samples with seeds from here on
# the context that pre-training taught: question, own attempt, verdict
TEMPLATES: dict[str, Any] = {
    "reprompt_template": "{prompt}{solution}{feedback}",
    "attempt_template": "{attempt}",
    "feedback_template": arithmetic.VERDICT.format("{feedback_raw}"),
}


def attempts(
    model: Any, tokenizer: Any, task: Task, question: Question, count: int, seed: int
) -> list[bool]:
    """Return the verdicts on ``count`` responses that are sampled from a fixed model."""
    prompts = [question.prompt] * count
    drawn = respond(model, tokenizer, prompts, task.max_response, temperature=1.0, seed=seed)
    return [task.is_right(*pair) for pair in zip(prompts, drawn.texts)]


def first(verdicts: Sequence[bool]) -> int | None:
    """Return the number of the first success, counted from 1; None: there is none."""
    return verdicts.index(True) + 1 if True in verdicts else None


def hard_questions(
    model: Any, tokenizer: Any, task: Task, part: str, search: Discovery, seed: int
) -> list[Question]:
    """Return the first questions of a part that the base model fails in every sample."""
    found: list[Question] = []
    for question in task.questions[part]:
        if not any(attempts(model, tokenizer, task, question, search.hard_samples, seed)):
            found.append(question)
        if len(found) == search.num_questions:
            break
    return found


def discover(
    task: Task, question: Question, rate: float, seed: int, search: Discovery, cache: Path
) -> int | None:
    """Let the model learn from its failures; return the number of the first right attempt."""
    model, tokenizer = load(task, seed, cache)

    def verdicts(prompts: list[str], completions: list[str], **_: object) -> list[str | None]:
        right = [task.is_right(*pair) for pair in zip(prompts, completions)]
        return [None if passed else arithmetic.WRONG for passed in right]

    with tempfile.TemporaryDirectory() as output:
        trainer = DiscoveryTrainer(
            model=model,
            reward_funcs=task.reward,
            args=DiscoveryConfig(
                output_dir=output,
                max_attempts=search.max_attempts,
                learning_rate=rate,
                lr_scheduler_type="constant",
                weight_decay=0.0,
                max_completion_length=task.max_response,
                distillation_topk=search.topk,
                include_own_attempt=True,
                observe=False,
                activation_checkpointing=False,
                use_cpu=device() == "cpu",
                bf16=False,
                seed=seed,
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
                **TEMPLATES,
            ),
            train_dataset=Dataset.from_list([{"prompt": question.prompt}]),
            processing_class=tokenizer,
            feedback_func=verdicts,
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return trainer.first_success


def compare(
    task: Task, rate: float, seed: int, search: Discovery, cache: Path, part: str = "held_out"
) -> dict[str, Any]:
    """Return the first success of either way on the same hard questions."""
    model, tokenizer = load(task, seed, cache)
    questions = hard_questions(model, tokenizer, task, part, search, seed)
    # fresh samples: those that made the questions hard are all wrong
    frozen = [
        first(attempts(model, tokenizer, task, question, search.max_attempts, FRESH_SEED + number))
        for number, question in enumerate(questions)
    ]
    torch.manual_seed(seed)
    learning = [discover(task, question, rate, seed, search, cache) for question in questions]
    return {
        "questions": [question.prompt for question in questions],
        "best of k": frozen,
        "self-distillation": learning,
    }
